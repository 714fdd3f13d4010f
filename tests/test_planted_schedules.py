"""The project's own detectors and schedules on what was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fna_lab.backbone.patch import patch
from fna_lab.backbone.planted import PlantedBackbone
from fna_lab.data.planted import PlantedData
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.ncut import NcutDetector
from fna_lab.mask.detector.norm_fixed import NormFixedDetector
from fna_lab.mask.detector.projection import ProjectionDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.singular_defect import SingularDefectDetector
from fna_lab.mask.detector.sink_rate import SinkRateDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.type1 import Type1Mask

DETECTORS = [
    NormFixedDetector(norm=30.0),
    IncomingDetector(),
    IncomingDetector(rule="std"),
    SinkRateDetector(),
    ProjectionDetector(),
    NcutDetector(),
    NcutDetector(value=0.9),
    SingularDefectDetector(),
    RegisterNeuronsDetector(neurons=PlantedBackbone().register_neurons),
]


@pytest.mark.parametrize("mask", [*DETECTORS, "iterative"], ids=lambda m: getattr(m, "name", m))
def test_truth_is_recovered_exactly(mask: Any) -> None:
    backbone = PlantedBackbone()
    data = PlantedData(transform=backbone.transform, count=12, batch_size=12)
    data.setup()
    images = next(iter(data.test_dataloader()))["image"]
    truth = backbone.truth(images)
    wanted = truth["massive"]
    if mask == "iterative":
        wanted = wanted | truth["artifact"]
        strategy = IterativeMaskingMask(detector=ClsProxyDetector(ratio=1.0))
    else:
        wanted = truth[mask.finds] if mask.name == "ncut" else wanted
        strategy = Type1Mask(detector=mask)
    # From block 3 on CLS's gift to itself is the largest defect of the weights.
    detect = 3 if getattr(mask, "name", "") == "singular_defect" else 5
    more = {"restart": 3} if mask == "iterative" else {}
    with torch.no_grad(), patch(backbone.host, "exact", strategy, detect=detect, mask_layers="5-7",
                                **more) as patched:  # fmt: skip
        backbone(images)
        assert patched.tokens is not None and torch.equal(patched.tokens, wanted)
        if mask == "iterative":
            ranks = patched.ranks
            assert ranks is not None and patched.rounds == wanted.sum(1).tolist()
            first = ranks.masked_fill(~truth["massive"], 0).amax(1)
            last = ranks.masked_fill(~truth["artifact"], 99).amin(1)
            assert (first < last).all()


def test_ncut_takes_rare_content_for_artifacts() -> None:
    """What it cannot tell: without artifacts it finds the patches that look unlike the others."""
    backbone = PlantedBackbone(planted=False)
    data = PlantedData(transform=backbone.transform, count=12, batch_size=12)
    data.setup()
    images = next(iter(data.test_dataloader()))["image"]
    odd = PlantedBackbone().truth(images)
    strategy = Type1Mask(detector=NcutDetector(value=0.9))
    with (
        torch.no_grad(),
        patch(backbone.host, "exact", strategy, detect=5, mask_layers="5-7") as patched,
    ):
        backbone(images)
        assert patched.tokens is not None and patched.tokens.any(1).all()
        assert not (patched.tokens & ~(odd["massive"] | odd["artifact"])).any()


def test_ncut_of_all_pictures_at_once_finds_artifacts_exactly(tmp_path: Path) -> None:
    """The published form, by a reference: the tokens of all pictures, cut together."""
    backbone = PlantedBackbone()
    data = PlantedData(transform=backbone.transform, count=12, batch_size=12)
    data.setup()
    images = next(iter(data.test_dataloader()))["image"]
    seen: list[torch.Tensor] = []
    backbone.host.blocks[5].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        backbone(images)
        np.save(tmp_path / "tokens.npy", seen[0][:, 1:].reshape(-1, 64).numpy())
        detector = NcutDetector(reference=str(tmp_path / "tokens.npy"))
        with patch(
            backbone.host, "exact", Type1Mask(detector=detector), detect=5, mask_layers="5-7"
        ) as patched:
            backbone(images)
            found = patched.tokens
    assert found is not None and torch.equal(found, backbone.truth(images)["artifact"])
