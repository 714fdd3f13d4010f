"""What is found and measured in a sentence does not depend on the padding behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bert import random_bert
from test_tasks import measure
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.block_svd import BlockSvdAttention
from fna_lab.attn.explicit import ExplicitAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.fna_paper import PublishedFastNystromAttention
from fna_lab.attn.landmarks.attention import AttentionLandmarks
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.landmarks.kmeans import KMeansLandmarks
from fna_lab.attn.landmarks.leverage import LeverageLandmarks
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.landmarks.segment import SegmentLandmarks
from fna_lab.attn.linformer_pool import LinformerPoolAttention
from fna_lab.attn.nystromformer import NystromformerAttention
from fna_lab.attn.performer import PerformerAttention
from fna_lab.attn.prune import PruneAttention
from fna_lab.attn.subset import SubsetAttention
from fna_lab.attn.tome import TomeAttention
from fna_lab.backbone.minilm import MiniLmBackbone
from fna_lab.backbone.patch import patch
from fna_lab.data.sentences import SentencesData
from fna_lab.mask.detector.base import Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.norm_fixed import NormFixedDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.projection import ProjectionDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.singular_defect import SingularDefectDetector
from fna_lab.mask.detector.sink_rate import SinkRateDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.iterative_sinking import IterativeSinkingMask
from fna_lab.mask.pattern import PatternMask
from fna_lab.mask.projection import ProjectionMask
from fna_lab.mask.redistribute import RedistributeMask
from fna_lab.mask.replace import ReplaceMask
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask
from fna_lab.task.agreement import Agreement
from fna_lab.task.anatomy import Anatomy
from fna_lab.task.fidelity import Fidelity

TEXTS = [
    "a red circle on a square",
    "there is a large red square and a circle on a circle , and there are red",
    "there are large red",
]
FPS = FarthestPointLandmarks()
LENGTHS = (14, 11, 7)

DETECTORS = [
    NormGapDetector(min_gap=0.1),
    NormRatioDetector(ratio=1.2),
    NormFixedDetector(norm=20.0),
    ClsProxyDetector(ratio=0.15),
    ClsProxyDetector(ratio=0.15, top=2, least=1.2),
    IncomingDetector(factor=1.5),
    IncomingDetector(rule="std", factor=1.0),
    IncomingDetector(rule="std", factor=1.0, log=True),
    SinkRateDetector(epsilon=0.15),
    ProjectionDetector(ratio=0.8),
    ProjectionDetector(ratio=0.2, direction=[1.0] + 15 * [0.1]),
    RegisterNeuronsDetector(neurons=[[0, 1], [0, 2]], ratio=1.3),
    SingularDefectDetector(stds=1.0),
]


def said(one: Any) -> str:
    return f"{one.name}-{one.threshold}"


def shown(has_cls: bool) -> dict[str, Any]:
    """Random tokens, with padding that is larger than they are and draws attention."""
    generator = torch.Generator().manual_seed(3)
    n = max(LENGTHS) + 6
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    kept = torch.arange(n) < torch.tensor(LENGTHS)[:, None]
    x, neurons = draw(3, n, 16), draw(3, n, 2)
    x[:, 4] *= 6
    x[~kept] *= 30
    neurons[~kept] *= 30
    q, k = 1.5 * draw(3, 2, n, 8), 1.5 * draw(3, 2, n, 8)
    bias = torch.zeros(3, 1, 1, n).masked_fill(~kept[:, None, None], -torch.inf)
    return dict(
        x=x, num_prefix_tokens=1, has_cls=has_cls, q=q, k=k, scale=8**-0.5, bias=bias, kept=kept,
        neurons=neurons, prepared=draw(16).double(),
    )  # fmt: skip


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("found", [None, "mask", "sink"])
@pytest.mark.parametrize("detector", DETECTORS, ids=said)
@pytest.mark.parametrize("blind", [False, True])
def test_detectors(detector: Any, found: str | None, has_cls: bool, blind: bool) -> None:
    padded = shown(has_cls)
    if blind:  # padding attends to nothing, and has rows of NaN
        padded["bias"] = padded["bias"].expand(-1, -1, len(padded["kept"][0]), -1)
        padded["bias"] = padded["bias"].masked_fill(~padded["kept"][:, None, :, None], -torch.inf)
    if found:
        gone = torch.zeros_like(padded["kept"])
        gone[:, 2] = True
        padded |= {"found": gone, "stage": found}
    tokens, scores = detector(Evidence(**padded)), detector.scores(Evidence(**padded))
    assert tokens.any() and not (tokens & ~padded["kept"]).any()
    for i, length in enumerate(LENGTHS):
        alone = {k: v[i : i + 1] if isinstance(v, Tensor) and k != "prepared" else v
                 for k, v in padded.items()}  # fmt: skip
        for name in ("x", "neurons", "found"):
            if name in alone:
                alone[name] = alone[name][:, :length]
        alone |= {"q": alone["q"][:, :, :length], "k": alone["k"][:, :, :length]}
        alone |= {"bias": None, "kept": None}
        evidence = Evidence(**alone)
        assert torch.equal(tokens[i, :length], detector(evidence)[0])
        torch.testing.assert_close(scores[i, :length], detector.scores(evidence)[0],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
        assert (scores[i, length:] == -torch.inf).all()


def test_kept_tokens_reads_every_padding_mask() -> None:
    keep = torch.tensor([[True, True, False]])
    least = torch.zeros(1, 3).masked_fill(~keep, torch.finfo(torch.float32).min)
    endless = torch.zeros(1, 3).masked_fill(~keep, -torch.inf)
    low = torch.zeros(1, 3).masked_fill(~keep, -1e4)  # as older hosts write it
    for mask in (keep, least, endless, low):
        found = ops.kept_tokens(mask[:, None, None])
        assert found is not None and torch.equal(found, keep)
    both = keep[:, :, None] & keep[:, None]  # timm's NaFlexViT: padding sees nothing
    for mask in (keep[:, None].expand(1, 3, 3).clone(), both):
        for whole in (mask, torch.zeros(1, 3, 3).masked_fill(~mask, -torch.inf)):
            found = ops.kept_tokens(whole[:, None])
            assert found is not None and torch.equal(found, keep)
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1))[None, None] > 0
    assert ops.kept_tokens(causal) is None and ops.kept_tokens(packed) is None
    assert ops.kept_tokens(None) is None
    assert ops.kept_tokens(torch.rand(1, 1, 3, 3)) is None  # a position bias
    assert ops.kept_tokens(torch.zeros(1, 4, 3, 3)) is None  # a position bias


@pytest.mark.parametrize("kept", [torch.ones(2, 5), torch.ones(3, 5, dtype=torch.bool)])
def test_bad_arguments_are_named(kept: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="Expected kept to"):
        ops.medians(torch.rand(2, 5), kept)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> list[MiniLmBackbone]:
    """One BERT for sentences of three lengths."""
    folder = random_bert(tmp_path_factory.mktemp("bert"))
    return [MiniLmBackbone(checkpoint=str(folder), max_tokens=n) for n in (20, 25, 32)]


def tokens_of(backbone: MiniLmBackbone) -> Tensor:
    return torch.stack([backbone.transform(text) for text in TEXTS])


def run(backbone: MiniLmBackbone, ids: Tensor, attn: Any, mask: Any) -> tuple[Tensor, Any]:
    with patch(backbone.host, attn, mask, layers="1-3", detect=1, restart=0, mask_layers="1-3",
               blocks=backbone.blocks_path) as patched:  # fmt: skip
        found = backbone(ids)
        mine = backbone.kept(ids)[:, 1:, None]
        assert not (found.patches * ~mine).any()
        return torch.cat([found.cls[:, None], found.patches], 1), patched.ranks


def check(backbones: list[MiniLmBackbone], attn: Any, mask: Any, *, finds: bool) -> None:
    """Batches of three lengths against every sentence alone, without padding."""
    one = backbones[0]
    alone = []
    for row, kept in zip(tokens_of(one), one.kept(tokens_of(one)), strict=True):
        alone.append(run(one, row[None, : kept.sum()], attn, mask))
    for backbone in backbones:
        features, ranks = run(backbone, tokens_of(backbone), attn, mask)
        assert not finds or (ranks > 0).any()
        for i, (feature, rank) in enumerate(alone):
            n = feature.shape[1]
            torch.testing.assert_close(features[i, :n], feature[0], rtol=2e-3, atol=2e-4)
            if finds:
                assert torch.equal(ranks[i, :n], rank[0]) and not ranks[i, n:].any()


STRONG = ClsProxyDetector(ratio=3.0)
MASKS = [
    *(kind(stage=stage, detector=STRONG) for kind in (Type1Mask, Type2Mask)
      for stage in ("mask", "sink")),
    *(PatternMask(pattern=name, stage=stage, detector=STRONG)
      for name in ("t_to_t", "t_to_others", "others_to_t", "t_self")
      for stage in ("mask", "sink")),
    PatternMask(pattern="x_self", stage="sink", detector=STRONG),
    IterativeMaskingMask(detector=STRONG),
    IterativeMaskingMask(detector=STRONG, per_round=None, pattern="type2"),
    IterativeSinkingMask(detector=IncomingDetector(factor=2.0), max_rounds=2),
    IterativeSinkingMask(detector=SinkRateDetector(epsilon=0.3), max_rounds=3),
    ReplaceMask(how="mean", detector=STRONG),
    ReplaceMask(how="permutation", detector=STRONG),
    RedistributeMask(detector=STRONG),
    ProjectionMask(pairs="type1", detector=STRONG),
]  # fmt: skip


@pytest.mark.parametrize(
    "mask", MASKS, ids=lambda m: f"{m.name}-{m.stage}-{m.pattern}-{m.detector.name}-{m.rounds}"
)
def test_masks_and_schedules(backbones: list[MiniLmBackbone], mask: Any) -> None:
    check(backbones, "exact", mask, finds=True)


VARIANTS = {
    "fna": FastNystromAttention(num_landmarks=5, landmarks=FPS),
    "fna input": FastNystromAttention(
        num_landmarks=5, landmarks=FPS, source="input", renew="never"
    ),
    "fna random": FastNystromAttention(num_landmarks=5, landmarks=RandomLandmarks()),
    "fna leverage": FastNystromAttention(num_landmarks=5, landmarks=LeverageLandmarks()),
    "fna without cls": FastNystromAttention(
        num_landmarks=4, landmarks=FPS, guarantee=(), exclude=("cls",)
    ),
    "fna_paper": PublishedFastNystromAttention(num_landmarks=5, landmarks=FPS),
    "fna guarded": FastNystromAttention(num_landmarks=5, landmarks=FPS, guard=0.3),
    "subset": SubsetAttention(num_landmarks=5, landmarks=FPS),
    "explicit": ExplicitAttention(num_landmarks=5, num_explicit=2, landmarks=FPS),
    "performer": PerformerAttention(num_features=32),
    "block_svd": BlockSvdAttention(),
}  # fmt: skip
# These cut the sequence, or a share of it, by its padded length; k-means has two-token clusters,
# of which rounding alone says which one is nearer to their mean.
BY_LENGTH = {
    "linformer_pool": LinformerPoolAttention(num_landmarks=5),
    "nystromformer": NystromformerAttention(num_landmarks=5),
    "tome": TomeAttention(),
    "prune": PruneAttention(),
    "fna attention": FastNystromAttention(num_landmarks=5, landmarks=AttentionLandmarks()),
    "fna segment": FastNystromAttention(num_landmarks=5, landmarks=SegmentLandmarks()),
    "fna kmeans": FastNystromAttention(num_landmarks=5, landmarks=KMeansLandmarks()),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mask", ["none", Type1Mask(detector=STRONG), Type2Mask(detector=STRONG)])
def test_variants(backbones: list[MiniLmBackbone], name: str, mask: Any) -> None:
    check(backbones, VARIANTS[name], mask, finds=mask != "none")


@pytest.mark.parametrize("name", [*BY_LENGTH, *VARIANTS])
def test_what_padding_holds_changes_nothing(backbones: list[MiniLmBackbone], name: str) -> None:
    backbone = backbones[1]
    ids, row = tokens_of(backbone), backbone.host.embeddings.word_embeddings.weight.data[0]
    before = row.clone()
    found = []
    for content in (before, torch.linspace(-9, 9, len(before))):
        row.copy_(content)
        variant = (BY_LENGTH | VARIANTS)[name]
        mask = Type1Mask(detector=STRONG) if name in VARIANTS else "none"
        found.append(run(backbone, ids, variant, mask)[0])
    row.copy_(before)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def data(backbone: MiniLmBackbone, path: Path) -> SentencesData:
    path.write_text("\n".join(TEXTS))
    return SentencesData(transform=backbone.transform, path=str(path), batch_size=2)


def taken(task: Any, backbone: MiniLmBackbone, path: Path, attn: Any, mask: Any) -> Any:
    """A task on the sentences, its blocks patched from the first on."""
    more = dict(mask_layers="1-3", detect=1) if mask != "none" else {}
    patched = patch(backbone.host, attn, mask, layers="all", blocks=backbone.blocks_path, **more)
    exact = patch(backbone.host, "exact", layers="all", blocks=backbone.blocks_path)
    made = task(backbone=backbone, patched=patched, exact=exact, cost=False)
    measure(made, data(backbone, path))
    return made


def same_facts(one: Any, other: Any) -> None:
    assert one.found.keys() == other.found.keys()
    for name, value in one.found.items():
        assert math.isclose(value, other.found[name], rel_tol=2e-3, abs_tol=2e-4), name
    for row, more in zip(one.rows, other.rows, strict=True):
        assert row.keys() == more.keys()
        for name, value in row.items():
            if isinstance(value, float):
                assert math.isclose(value, more[name], rel_tol=2e-3, abs_tol=2e-4), name
            else:
                assert value == more[name], name


def test_fidelity(backbones: list[MiniLmBackbone], tmp_path: Path) -> None:
    attn = VARIANTS["fna"]
    mask = Type2Mask(detector=STRONG)
    one, two, three = (taken(Fidelity, b, tmp_path / "t", attn, mask) for b in backbones)
    assert 0.1 < one.found["patch_cosine"] < 0.9999 and one.found["layer_error/03"] > 0.01
    same_facts(one, two)
    same_facts(one, three)
    # The slow way: each sentence without padding, exact and patched.
    backbone, cosines = backbones[0], []
    for row, kept in zip(tokens_of(backbone), backbone.kept(tokens_of(backbone)), strict=True):
        ids = row[None, : kept.sum()]
        with patch(backbone.host, attn, mask, layers="all", mask_layers="1-3", detect=1,
                   blocks=backbone.blocks_path) as patched:  # fmt: skip
            mine = backbone(ids).patches
            with patched.disabled():
                exact = backbone(ids).patches
        cosines.append(torch.cosine_similarity(mine, exact, dim=-1).mean().item())
    assert math.isclose(one.found["patch_cosine"], sum(cosines) / 3, rel_tol=1e-3)


def test_anatomy(backbones: list[MiniLmBackbone], tmp_path: Path) -> None:
    def task(**common: Any) -> Anatomy:
        return Anatomy(measure="all", pictures=3, rounds=2, **common)

    one, two, three = (taken(task, b, tmp_path / "t", "exact", "none") for b in backbones)
    groups = {name.split("/")[0] for name in one.found}
    assert {"norms", "mass", "incoming", "sink_rate", "qk", "ov", "suppression", "growth", "decay",
            "pca_explained_1", "largest_norm"} <= groups  # fmt: skip
    same_facts(one, two)
    same_facts(one, three)
    n = one.arrays["map_classes"].shape[1]
    for more in (two, three):
        for name, value in one.arrays.items():
            other = more.arrays[name]
            if name.startswith("map_pixels") or name == "map_matrix_tokens":
                continue
            if name in ("map_ncut", "topology_samples"):
                continue  # vectors of nearly equal values are mixed at will
            if value.shape != other.shape:  # a token each: the longer one holds padding behind
                cut = [slice(0, size) for size in value.shape]
                other = other[tuple(cut)]
            if name.startswith(("map_pca", "map_place")):
                # Of several entries of equal size rounding may choose the sign.
                value, other = np.abs(value), np.abs(other)
            np.testing.assert_allclose(other, value, rtol=5e-3, atol=5e-4, err_msg=name)
        assert (more.arrays["map_classes"][:, n:] == -1).all()


def test_agreement(backbones: list[MiniLmBackbone], tmp_path: Path) -> None:
    detectors = {
        "norm_ratio": NormRatioDetector(ratio=1.001),
        "incoming": IncomingDetector(factor=1.2),
        "cls_proxy": ClsProxyDetector(ratio=1.0),
        "projection": ProjectionDetector(ratio=0.5),
        "singular_defect": SingularDefectDetector(stds=0.5, samples=200),
    }

    def task(**common: Any) -> Agreement:
        return Agreement(detectors=detectors, names=list(detectors), **common)

    one, two, three = (taken(task, b, tmp_path / "t", "exact", "none") for b in backbones)
    assert all(one.found[f"found/{name}"] > 0 for name in detectors), one.found
    assert not any(name.startswith("stable") for name in one.found)  # sentences do not change
    same_facts(one, two)
    same_facts(one, three)
