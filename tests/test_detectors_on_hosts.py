"""Detectors inside a patch, on hosts with and without CLS, registers, and a position bias."""

from __future__ import annotations

import pytest
import torch
from hosts import build

import fna_lab
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.norm_fixed import NormFixedDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.projection import ProjectionDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.singular_defect import SingularDefectDetector
from fna_lab.mask.detector.sink_rate import SinkRateDetector
from fna_lab.mask.type1 import Type1Mask

# Thresholds low enough to find some of the tokens of random weights.
DETECTORS: dict[str, Detector] = {
    "cls_proxy": ClsProxyDetector(ratio=1.01),
    "incoming": IncomingDetector(factor=1.02),
    "incoming std": IncomingDetector(rule="std", factor=0.7, log=True),
    "sink_rate": SinkRateDetector(epsilon=0.05, share=0.2),
    "norm_fixed": NormFixedDetector(norm=0.0001),
    "projection": ProjectionDetector(ratio=0.6),
    "register_neurons": RegisterNeuronsDetector(neurons=[[0, 5], [1, 30]], ratio=1.3),
    "singular_defect": SingularDefectDetector(stds=0.8, samples=200),
}
NAMES = ["timm vit", "timm vit without cls", "timm dinov2 registers", "timm beit", "timm siglip",
         "open_clip", "transformers clip"]  # fmt: skip


def usable(detector: str, name: str) -> bool:
    return detector != "singular_defect" or name != "timm beit"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("detector", [d for d in DETECTORS if d != "norm_fixed"])
def test_a_patch_shows_detectors_what_the_block_does(name: str, detector: str) -> None:
    if not usable(detector, name):
        pytest.skip("refused by name; see test_detectors")
    host, model, x = build(name)
    for key, value in model.named_parameters():
        if key.endswith(("ls1.gamma", "ls2.gamma")):
            value.fill_(1.0)  # 1e-5 at the start of a training would leave all tokens alike
    one = DETECTORS[detector]
    if detector == "cls_proxy" and not host.cls:
        one = ClsProxyDetector(ratio=0.115)  # of nine uniform shares
    seen: dict[str, Evidence] = {}

    def observe(q, k, v, context):  # noqa: ARG001
        if context.layer == 2:
            seen["it"] = Evidence(
                context.x, host.prefix, host.cls, q=q, k=k, scale=context.scale,
                bias=context.attn_mask,
            )  # fmt: skip

    mask = Type1Mask(detector=one)
    with fna_lab.patch(model, "exact", mask, layers="2-3", mask_layers="2-3", detect=2) as patched:
        with patched.observed(observe):
            host.run(model, x)
        found = patched.tokens
        assert found is not None and found.any() and not found[:, : host.prefix].any()
        evidence = seen["it"]
        search = patched.searches[0]
        evidence.prepared = search.prepared
        assert search.neurons is not None
        evidence.neurons = search.neurons.read()
        assert torch.equal(one(evidence), found)
        alone = []
        for picture in x.split(1):
            host.run(model, picture)
            assert patched.tokens is not None
            alone.append(patched.tokens)
        assert torch.equal(torch.cat(alone), found)


@pytest.mark.parametrize("detector", ["incoming", "sink_rate", "projection", "register_neurons"])
def test_rounds_add_tokens_and_end(detector: str) -> None:
    host, model, x = build("timm vit without cls")
    mask = Type1Mask(detector=DETECTORS[detector], schedule="iterative", max_rounds=4)
    with fna_lab.patch(model, "exact", mask, mask_layers="3", detect=3, restart=2) as patched:
        host.run(model, x)
        assert patched.tokens is not None
        counts = patched.tokens.sum(1)
        assert (counts <= 4).all() and (counts > 0).any()


def test_a_threshold_that_finds_everything_is_named() -> None:
    host, model, x = build("timm vit")
    mask = Type1Mask(detector=DETECTORS["norm_fixed"])
    with pytest.raises(ValueError, match=r"norm_fixed \(norm=0.0001\) finds all 25 patch tokens"):
        with fna_lab.patch(model, "exact", mask):
            host.run(model, x)


def test_a_random_model_has_nothing_to_find() -> None:
    """The negative control, with published thresholds; the published CLS proxy fails it."""
    host, model, _ = build("timm clip")
    x = torch.randn(4, 3, host.img_size, host.img_size)
    defaults: list[Detector] = [
        NormGapDetector(), NormRatioDetector(), NormFixedDetector(), IncomingDetector(),
        IncomingDetector(rule="std"), SinkRateDetector(), ProjectionDetector(),
        ClsProxyDetector(least=3.0), SingularDefectDetector(),
    ]  # fmt: skip
    for one in defaults:
        with fna_lab.patch(model, "exact", Type1Mask(detector=one), layers="2-3") as patched:
            host.run(model, x)
            assert patched.tokens is not None and not patched.tokens.any(), one.name
    with fna_lab.patch(model, "exact", Type1Mask(detector=ClsProxyDetector()), layers="2-3"):
        with pytest.raises(ValueError, match="finds all 25 patch tokens"):
            host.run(model, x)
