"""Tasks end to end on a small host, against the same numbers computed by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

from fna_lab.backbone.base import Backbone
from fna_lab.backbone.patch import Patch, patch
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.data.photos import PhotosData
from fna_lab.data.shapes import ShapesData
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.none import NoMask
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask
from fna_lab.task.anatomy import Anatomy
from fna_lab.task.base import Task
from fna_lab.task.classification import Classification
from fna_lab.task.fidelity import Fidelity


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return TimmBackbone(
        name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False, img_size=64
    )


def patches(backbone: Backbone, attn: str = "exact", **settings: Any) -> tuple[Patch, Patch]:
    patched = patch(backbone.host, attn, layers="6-11", **settings)
    exact = patch(backbone.host, "exact", layers="6-11")
    exact.enabled = False
    return patched, exact


def measure(task: Task, data: L.LightningDataModule) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data.setup("test")
    trainer.test(task, data, verbose=False)
    task.patched.remove()
    task.exact.remove()
    return task.found


def test_fidelity_of_exact_attention_is_one(backbone: Backbone) -> None:
    patched, exact = patches(backbone)
    task = Fidelity(backbone=backbone, patched=patched, exact=exact, cost=False)
    found = measure(task, PhotosData(transform=backbone.transform, batch_size=3))
    assert found["n"] == 4 and found["neighbour_agreement"] == 1
    for name in ("cls_cosine", "pooled_cosine", "patch_cosine"):
        assert abs(found[name] - 1) < 1e-6
    assert max(v for k, v in found.items() if k.startswith("layer_error")) < 1e-5


def test_fidelity_equals_the_comparison_by_hand(backbone: Backbone) -> None:
    settings = dict(num_landmarks=4)
    data = PhotosData(transform=backbone.transform, batch_size=3)
    data.setup()
    images = torch.stack([data.test_set[i]["image"] for i in range(4)])  # type: ignore[index]
    with torch.no_grad():
        exact = backbone.host.forward_features(images)  # type: ignore[operator]
        with patch(backbone.host, "fna", layers="6-11", **settings):
            approximate = backbone.host.forward_features(images)  # type: ignore[operator]
    cosines = F.cosine_similarity(exact.double(), approximate.double(), dim=-1)
    patched, second = patches(backbone, "fna", **settings)
    task = Fidelity(backbone=backbone, patched=patched, exact=second, cost=True)
    found = measure(task, data)
    assert found["cls_cosine"] == pytest.approx(cosines[:, 0].mean().item(), abs=1e-6)
    assert found["patch_cosine"] == pytest.approx(cosines[:, 1:].mean().item(), abs=1e-6)
    assert found["patch_cosine"] < 1 - 2e-6
    errors = [found[f"layer_error/{i:02d}"] for i in range(12)]
    assert max(errors[:6]) == 0 and min(errors[6:]) > 0
    assert [row["cls_cosine"] for row in task.rows] == pytest.approx(
        cosines[:, 0].tolist(), abs=1e-6
    )
    assert task.costs["exact_total_ms"] and task.costs["patched_selection_ms"]
    # The clock leaves the model as it found it.
    with torch.no_grad():
        assert torch.equal(backbone.host.forward_features(images), exact)  # type: ignore[operator]


def test_knn_equals_votes_by_hand(backbone: Backbone) -> None:
    data = ShapesData(
        transform=backbone.transform, count=30, bank_count=80, img_size=64, label="colour"
    )
    patched, exact = patches(backbone)
    task = Classification(
        backbone=backbone, patched=patched, exact=exact, cost=False, protocols=["knn"], knn_k=[5]
    )
    found = measure(task, data)
    assert set(found) == {"n", "knn5_accuracy", "knn5_balanced_accuracy"}
    with torch.no_grad():

        def embed(pictures: Any) -> tuple[torch.Tensor, np.ndarray]:
            samples = [pictures[i] for i in range(len(pictures))]
            features = backbone(torch.stack([s["image"] for s in samples])).pooled.double()
            return F.normalize(features, dim=-1), np.array([s["label"] for s in samples])

        queries, truth = embed(data.test_set)
        bank, labels = embed(data.bank())
    guesses = []
    for row in (queries @ bank.mT).numpy():
        near = np.argsort(-row)[:5]
        votes = np.bincount(labels[near], np.exp(row[near] / 0.07), minlength=8)
        guesses.append(votes.argmax())
    assert found["knn5_accuracy"] == pytest.approx((np.array(guesses) == truth).mean())
    wanted = balanced_accuracy_score(truth, guesses)
    assert found["knn5_balanced_accuracy"] == pytest.approx(wanted)
    assert [row["knn5_guess"] for row in task.rows] == guesses


class Thousand(ShapesData):
    """As many classes as the host's own head has."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.classnames = [str(i) for i in range(1000)]


def test_head_is_the_hosts_own(backbone: Backbone) -> None:
    data = Thousand(transform=backbone.transform, count=8, img_size=64)
    patched, exact = patches(backbone)
    task = Classification(
        backbone=backbone, patched=patched, exact=exact, cost=False, protocols=["head"]
    )
    measure(task, data)
    images = torch.stack([data.test_set[i]["image"] for i in range(8)])  # type: ignore[index]
    with torch.no_grad():
        wanted = backbone.host(images).argmax(1).tolist()
    assert [row["head_guess"] for row in task.rows] == wanted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"protocols": ["zero_shot"]}, "has no text tower"),
        ({"protocols": ["head"]}, "a head of 1000 classes, and data=shapes has 64"),
        ({"protocols": ["knn"], "knn_k": [900]}, "wants more neighbours than the 20 pictures"),
    ],
)
def test_impossible_protocols_are_refused(
    backbone: Backbone, settings: dict[str, Any], said: str
) -> None:
    data = ShapesData(
        transform=backbone.transform, count=4, bank_count=20, img_size=64, label="shape_colour"
    )
    patched, exact = patches(backbone)
    task = Classification(backbone=backbone, patched=patched, exact=exact, cost=False, **settings)
    try:
        with pytest.raises(ValueError, match=said):
            measure(task, data)
    finally:
        patched.remove()
        exact.remove()


def test_features_that_are_not_finite_are_an_error(backbone: Backbone) -> None:
    patched, exact = patches(backbone)
    task = Fidelity(backbone=backbone, patched=patched, exact=exact, cost=False)
    data = PhotosData(transform=lambda p: backbone.transform(p) * torch.nan)
    try:
        with pytest.raises(ValueError, match="features that are NaN or infinite under attn=exact"):
            measure(task, data)
    finally:
        patched.remove()
        exact.remove()


@pytest.mark.parametrize("mask", ["none", "type1", "type2"])
def test_anatomy_sees_every_block_as_it_is(backbone: Backbone, mask: str) -> None:
    data = ShapesData(transform=backbone.transform, count=5, img_size=64, batch_size=3)
    detector = NormGapDetector(min_gap=0.0)  # always finds something
    variants: dict[str, Any] = {"none": NoMask(), "type1": Type1Mask(detector=detector),
                                "type2": Type2Mask(detector=detector)}  # fmt: skip
    settings = {} if mask == "none" else {"mask_layers": "8-9", "detect": 5}
    patched, exact = patches(backbone, mask=variants[mask], **settings)
    task = Anatomy(backbone=backbone, patched=patched, exact=exact, cost=False)
    found = measure(task, data)
    blocks = {key.split("/")[-1] for key in found if "/" in key}
    assert blocks == {f"{i:02d}" for i in range(12)}

    # By hand: what timm itself says of attention, with its fused kernel switched off.
    data.setup()
    images = torch.stack([data.test_set[i]["image"] for i in range(5)])  # type: ignore[index]
    shares, norms = {}, {}
    block = backbone.blocks[7 if mask == "none" else 8]

    def look(module: Any, args: Any) -> None:
        attn, x = block.attn, args[0]
        q, k, _ = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        weights = torch.einsum("bnhd,bmhd->bhnm", q * attn.scale, k).softmax(-1)
        shares["free"] = weights.mean((1, 2))
        norms["x"] = x[:, 1:].norm(dim=-1)

    hook = block.register_forward_pre_hook(look)
    with torch.no_grad(), patch(backbone.host, "exact", variants[mask], layers="6-11", **settings):
        backbone(images)
    hook.remove()
    layer = "07" if mask == "none" else "08"
    medians = norms["x"].median(1, keepdim=True).values
    wanted = (norms["x"] / medians).amax(1).mean().item()
    assert found[f"largest_norm/{layer}"] == pytest.approx(wanted, rel=1e-5)
    top = 17 * shares["free"][:, 1:].amax(1).mean().item()
    if mask == "none":
        assert found[f"top_incoming/{layer}"] == pytest.approx(top, rel=1e-5)
    else:
        assert found[f"top_incoming/{layer}"] != pytest.approx(top, rel=1e-5)
    assert [row["index"] for row in task.rows] == list(range(5))


def test_anatomy_leaves_the_model_as_it_was(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = backbone(images).pooled
        with patch(backbone.host, "fna", layers="6-11", num_landmarks=4) as patched:
            plain = backbone(images).pooled
            seen = []
            with patched.observed(lambda q, k, v, context: seen.append(context.layer)):
                watched = backbone(images).pooled
            assert seen == list(range(12))
            assert torch.equal(watched, plain) and torch.equal(backbone(images).pooled, plain)
        assert torch.equal(backbone(images).pooled, before)
