"""Attention through fewer vectors than tokens: means of segments, and landmarks that run out."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from calls import BIAS, KEEP, call

from fna_lab.attn.base import Context
from fna_lab.attn.explicit import ExplicitAttention
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.landmarks.kmeans import KMeansLandmarks
from fna_lab.attn.landmarks.leverage import LeverageLandmarks
from fna_lab.attn.landmarks.random import RandomLandmarks
from fna_lab.attn.landmarks.segment import SegmentLandmarks
from fna_lab.attn.linformer_pool import LinformerPoolAttention
from fna_lab.attn.nystromformer import NystromformerAttention
from fna_lab.attn.performer import PerformerAttention
from fna_lab.attn.prune import PruneAttention
from fna_lab.attn.solver.lstsq import LeastSquaresSolver
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver
from fna_lab.attn.solver.pinv import PinvSolver
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.attn.subset import SubsetAttention
from fna_lab.attn.tome import TomeAttention

GAP = (torch.tensor([True] * 4 + [False] * 3 + [True] * 18)).expand(2, 1, 1, -1)  # a segment


@pytest.mark.parametrize("attn", [SubsetAttention, FastNystromAttention])
@pytest.mark.parametrize(
    "sampler", [FarthestPointLandmarks(), SegmentLandmarks(), RandomLandmarks()]
)
def test_classes_that_leave_no_landmark_leave_one_that_is_no_padding(attn, sampler):
    keep = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    keep[0, ..., :4] = False
    massive = torch.ones(2, 25, dtype=torch.bool)
    massive[1, ::2] = False
    q, k, v, context = call(attn_mask=keep, classes={"massive": massive})
    v[0, :, :4] = 1e6  # padding
    variant = attn(landmarks=sampler, num_landmarks=3, guarantee=[], exclude=["massive"])
    out = variant(q, k, v, context)
    marks, _ = variant.taken(q, context)
    assert keep[:, 0, 0].gather(1, marks).all() and not massive[1, marks[1]].any()
    assert len(set(marks[0].tolist())) == 1 and out.abs().max() < 100


@pytest.mark.parametrize("padded", [False, True])
def test_landmarks_of_heads_in_a_batch_without_pictures(padded):
    q, k, v, context = call(attn_mask=KEEP[:0] if padded else None)
    context.x = context.x[:0]
    context.classes = {"massive": torch.zeros(0, 25, dtype=torch.bool)}
    variant = FastNystromAttention(num_landmarks=5, per_head=True, exclude=["massive"])
    assert variant(q[:0], k[:0], v[:0], context).shape == q[:0].shape


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("attn", [ExplicitAttention, FastNystromAttention])
def test_compiled_masks_of_all_queries_are_padding_too(attn, both_ways):
    keep = (torch.arange(25) < 18).expand(2, -1)
    pairs = (keep[:, :, None] | (not both_ways)) & keep[:, None]
    mask = torch.zeros(2, 1, 25, 25).double().masked_fill(~pairs[:, None], -torch.inf)
    q, k, v, context = call(attn_mask=mask)
    more = {"num_explicit": 3} if attn is ExplicitAttention else {}
    variant = attn(num_landmarks=8, landmarks=FarthestPointLandmarks(), **more)

    def attend(q, k, v):
        context.shared.clear()
        return variant(q, k, v, context)

    eager = attend(q, k, v)[:, :, :18]
    compiled = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v)[:, :, :18]
    torch.testing.assert_close(compiled, eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("attn", [SubsetAttention, FastNystromAttention])
def test_landmarks_serve_no_block_with_other_tokens(attn):
    q, k, v, context = call()
    variant = attn(num_landmarks=5, landmarks=FarthestPointLandmarks(), renew="never")
    variant(q, k, v, context)
    fewer = [t[:, :, :20] for t in (q, k, v)]
    last = {"x": context.x[:, :20], "grid": None}
    found = variant(*fewer, dataclasses.replace(context, layer=2, nth=1, **last))
    alone = variant(*fewer, dataclasses.replace(context, layer=2, shared={}, **last))
    torch.testing.assert_close(found, alone)


def segment_means(keep):
    """One row of averages for CLS, four segments of three tokens, three of four: `[b 1 8 n]`."""
    cuts = [0, 1, 4, 7, 10, 13, 17, 21, 25]
    rows = torch.zeros(2, 1, 8, 25, dtype=torch.float64)
    for row, (start, stop) in enumerate(itertools.pairwise(cuts)):
        rows[:, :, row, start:stop] = 1
    rows = rows * keep
    return rows / rows.sum(-1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("mask", [None, KEEP, BIAS, GAP], ids=["none", "padding", "bias", "gap"])
@pytest.mark.parametrize("linformer", [False, True])
def test_attention_to_segments_equals_its_definition(mask, linformer):
    q, k, v, context = call(attn_mask=mask)
    padded = mask is not None and mask.dtype == torch.bool
    keep = mask.double() if padded else torch.ones(2, 1, 1, 25, dtype=torch.float64)
    pool = segment_means(keep)
    bias = torch.zeros(1, dtype=torch.float64) if mask is None or padded else mask
    alive = pool.any(-1)[:, :, None]  # a segment of padding alone has no key
    columns = context.scale * q @ (pool @ k).mT + (bias @ pool.mT if bias.ndim > 1 else 0)
    columns = columns.masked_fill(~alive, -torch.inf).softmax(-1)
    if linformer:
        found = LinformerPoolAttention(num_landmarks=8)(q, k, v, context)
        torch.testing.assert_close(found, columns @ pool @ v)
        return
    found = NystromformerAttention(num_landmarks=8, solver=PinvSolver())(q, k, v, context)
    rows = context.scale * pool @ q @ k.mT + (pool @ bias if bias.ndim > 1 else 0)
    middle = rows.masked_fill(keep == 0, -torch.inf).softmax(-1) @ v
    corner = context.scale * pool @ q @ (pool @ k).mT
    corner = corner + (pool @ bias @ pool.mT if bias.ndim > 1 else 0)
    for b in range(2):
        there = alive[b, 0, 0]
        some = corner[b][:, there][..., there].softmax(-1)
        wanted = columns[b][..., there] @ torch.linalg.pinv(some) @ middle[b][:, there]
        torch.testing.assert_close(found[b], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", [NystromformerAttention, LinformerPoolAttention])
@pytest.mark.parametrize(
    ("num", "words"),
    [
        (5, "attn.num_landmarks=5: expected at least 6 segments, one for each of 5 prefix tokens"),
        (26, "attn.num_landmarks=26: more segments than the 25 tokens"),
    ],
)
def test_segments_that_do_not_fit_are_named(variant, num, words):
    q = torch.randn(1, 2, 25, 8)
    context = Context(layer=0, nth=0, scale=0.3, x=torch.randn(1, 25, 16), num_prefix_tokens=5)
    with pytest.raises(ValueError, match=words):
        variant(num_landmarks=num)(q, q, q, context)
    assert variant(num_landmarks=6)(q, q, q, context).isfinite().all()


WRONG = [
    (FastNystromAttention, "per_head", "false"),
    (FastNystromAttention, "clusters", "false"),
    (FastNystromAttention, "exact_cls", 1),
    (FastNystromAttention, "sketch", True),
    (FastNystromAttention, "rows", float("nan")),
    (FastNystromAttention, "guard", "x"),
    (PerformerAttention, "num_features", True),
    (PerformerAttention, "seed", "a"),
    (TomeAttention, "ratio", False),
    (PruneAttention, "keep", float("nan")),
    (RandomLandmarks, "landmarks.seed", "x"),
    (LeverageLandmarks, "landmarks.seed", 0.5),
    (LeverageLandmarks, "landmarks.ridge", "a"),
    (KMeansLandmarks, "landmarks.steps", True),
    (GridFarthestPointLandmarks, "landmarks.share", True),
    (RidgeSolver, "solver.ridge", "x"),
    (NewtonSchulzSolver, "solver.iters", True),
    (LeastSquaresSolver, "solver.tolerance", "x"),
]


@pytest.mark.parametrize(("part", "setting", "value"), WRONG)
def test_settings_of_another_type_are_named(part, setting, value):
    with pytest.raises(ValueError, match=f"attn.{setting}={value!r}: expected "):
        part(**{setting.rpartition(".")[2]: value})
