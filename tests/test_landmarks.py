"""The contract of every landmark sampler and solver, found in their folders."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import fna_lab
from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.solver.base import Solver

ROOT = Path(fna_lab.__file__).parent / "attn"


def variants(folder: str, base: type) -> dict:
    found = {}
    for path in sorted((ROOT / folder).glob("*.py")):
        module = importlib.import_module(f"fna_lab.attn.{folder}.{path.stem}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and cls is not base and cls.__module__ == module.__name__:
                found[path.stem] = cls
    return found


SAMPLERS = variants("landmarks", LandmarkSampler)
SOLVERS = variants("solver", Solver)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
GRID = (5, 8)


def choose(name, points, num, *, prefix=1, guaranteed=None, allowed=None):
    none = torch.zeros(points.shape[0], 0, dtype=torch.long)
    sampler = SAMPLERS[name]()
    if sampler.reads == "attention":
        drawn = sampler.drawn(
            points[:, None],
            points[:, None],
            scale=0.2,
            allowed=allowed,
            has_cls=prefix > 0,
            num_prefix_tokens=prefix,
            grid=GRID,
        )
        points = drawn.mean(1)[..., None]
    return sampler(
        points,
        num,
        guaranteed=none if guaranteed is None else guaranteed,
        allowed=allowed,
        num_prefix_tokens=prefix,
        grid=GRID,
    )


def tokens(prefix, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + 40, 24, generator=generator)


@every_sampler
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("num", [1, 7, 16, 40])
def test_landmarks_are_distinct_tokens(name, prefix, num):
    picks = choose(name, tokens(prefix), num, prefix=prefix)
    assert picks.shape == (3, num) and picks.dtype == torch.long
    for row in picks.tolist():
        assert len(set(row)) == num and 0 <= min(row) and max(row) < prefix + 40


@every_sampler
def test_a_compiled_graph_holds_each_whole_at_any_size(name):
    def run(points):
        return choose(name, points, 9, guaranteed=torch.zeros(3, 1, dtype=torch.long))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for channels in (24, 32, 40):
        points = torch.randn(3, 41, channels, generator=torch.Generator().manual_seed(channels))
        assert torch.equal(compiled(points), run(points))
    torch._dynamo.reset()


@every_sampler
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_every_token_may_be_a_landmark(name, prefix):
    picks = choose(name, tokens(prefix), prefix + 40, prefix=prefix)
    assert (picks.sort(1).values == torch.arange(prefix + 40)).all()


@every_sampler
@pytest.mark.parametrize("num", [2, 9, 30])
def test_guaranteed_tokens_are_in(name, num):
    guaranteed = torch.tensor([[0, 17], [0, 3], [0, 40]])
    picks = choose(name, tokens(1), num, guaranteed=guaranteed)
    for row, wanted in zip(picks.tolist(), guaranteed.tolist(), strict=True):
        assert set(wanted) <= set(row) and len(set(row)) == num


@every_sampler
def test_guaranteed_prefix_tokens_come_first(name):
    guaranteed = torch.arange(5).expand(3, -1)  # the first is given its exact output
    picks = choose(name, tokens(5), 12, prefix=5, guaranteed=guaranteed)
    assert torch.equal(picks[:, :5], guaranteed)
    assert torch.equal(choose(name, tokens(5), 5, prefix=5, guaranteed=guaranteed), guaranteed)


@every_sampler
def test_forbidden_tokens_are_out(name):
    allowed = torch.rand(3, 41, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[:, 0] = True
    picks = choose(name, tokens(1), 12, guaranteed=torch.zeros(3, 1).long(), allowed=allowed)
    assert allowed.gather(1, picks).all()
    assert all(len(set(row)) == 12 for row in picks.tolist())


@every_sampler
@pytest.mark.parametrize("given", [0, 1])
def test_prefix_tokens_are_taken_before_any_token_twice(name, given):
    allowed = torch.arange(45).expand(3, -1) < torch.tensor([[12], [17], [45]])
    guaranteed = torch.zeros(3, given, dtype=torch.long)
    picks = choose(name, tokens(5), 12, prefix=5, guaranteed=guaranteed, allowed=allowed)
    assert allowed.gather(1, picks).all()
    assert all(len(set(row)) == 12 for row in picks.tolist())


@every_sampler
def test_a_picture_does_not_see_its_batch_mates(name):
    points = tokens(1)
    together = choose(name, points, 12)
    alone = torch.cat([choose(name, points[i : i + 1], 12) for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(together, choose(name, points, 12))


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_and_equal_points(name, dtype):
    for points in (tokens(1).to(dtype), torch.ones(2, 41, 24, dtype=dtype)):
        assert all(len(set(row)) == 10 for row in choose(name, points, 10).tolist())


@every_sampler
def test_the_choice_costs_something_only_if_it_looks(name):
    sampler = SAMPLERS[name]()
    blind = name in ("grid", "random", "segment")
    assert (sampler.flops(1370, 384, 64) == 0) == blind


def test_leverage_equals_its_definition():
    points = tokens(1).double()
    gram = points.mT @ points
    level = 0.1 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    wanted = (points @ torch.linalg.inv(gram + level * torch.eye(24)) * points).sum(-1)
    torch.testing.assert_close(ops.leverage_scores(points, ridge=0.1), wanted)


def test_medoids_of_clear_clusters_are_one_token_each():
    centres = 100 * torch.eye(6)
    label = torch.arange(36) % 6
    noise = torch.randn(36, 6, generator=torch.Generator().manual_seed(0))
    points = (centres[label] + noise)[None]
    seeds = torch.arange(6)[None]
    medoids = ops.cluster_medoids(points, seeds, allowed=torch.ones(1, 36, dtype=torch.bool))
    assert label[medoids[0]].tolist() == [0, 1, 2, 3, 4, 5]
    for cluster, medoid in enumerate(medoids[0].tolist()):
        members = points[0, label == cluster]
        distance = (members - members.mean(0)).norm(dim=1)
        assert (points[0, medoid] - members.mean(0)).norm() == pytest.approx(distance.min().item())


def test_ncut_takes_one_token_of_every_group():
    """Of all sizes, where farthest points may take several of a wide one first."""
    label = torch.arange(7).repeat_interleave(torch.tensor([1, 2, 3, 5, 8, 13, 9]))
    label = label[torch.randperm(41, generator=torch.Generator().manual_seed(2))]
    noise = torch.randn(2, 41, 24, generator=torch.Generator().manual_seed(0))
    points = 60 * torch.eye(24)[label] + noise
    picks = choose("ncut", points, 7)
    assert label[picks].sort(1).values.tolist() == 2 * [list(range(7))]
    guaranteed = picks[:, 2:3]
    again = choose("ncut", points, 8, guaranteed=guaranteed)
    assert torch.equal(again[:, :1], guaranteed)
    assert all(set(row) == set(range(7)) for row in label[again].tolist())


def test_ncut_settings_are_checked():
    with pytest.raises(ValueError, match="attn.landmarks.samples=0"):
        SAMPLERS["ncut"](samples=0)
    with pytest.raises(ValueError, match="attn.landmarks.steps=-1"):
        SAMPLERS["ncut"](steps=-1)


@pytest.mark.parametrize("name", ["fps", "grid_fps", "joint", "kmeans"])
@pytest.mark.parametrize("sketch", [0, "much", True, 1.5])
def test_a_sketch_of_no_dimensions_is_refused_before_any_run(name, sketch):
    with pytest.raises(ValueError, match=f"attn.landmarks.sketch={sketch!r}: expected"):
        SAMPLERS[name](sketch=sketch)


@pytest.mark.parametrize(
    ("name", "setting", "value"), [("fps", "block", "two"), ("grid_fps", "share", "half")]
)
def test_settings_of_samplers_that_are_no_numbers_are_named(name, setting, value):
    with pytest.raises(ValueError, match=f"attn.landmarks.{setting}={value!r}: expected"):
        SAMPLERS[name](**{setting: value})


def test_segment_centres_are_evenly_spread():
    allowed = torch.ones(1, 40, dtype=torch.bool)
    assert ops.segment_centres(allowed, 4).tolist() == [[5, 15, 25, 35]]
    allowed[:, :20] = False
    assert ops.segment_centres(allowed, 4).tolist() == [[22, 27, 32, 37]]


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_invert_a_good_kernel_and_stay_finite_on_a_bad_one(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator)
    kernel = (logits + 6 * torch.eye(12)).softmax(-1)
    values = torch.randn(2, 3, 12, 5, dtype=torch.float64, generator=generator)
    found = SOLVERS[name]()(kernel, values)
    torch.testing.assert_close(kernel @ found, values, rtol=0.05, atol=0.05)
    flat = torch.full((1, 1, 12, 12), 1 / 12)
    assert torch.isfinite(SOLVERS[name]()(flat, values[:1, :1].float())).all()


@pytest.mark.parametrize("has_cls", [True, False])
def test_drawn_attention_equals_its_definition(has_cls):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 41, 8, dtype=torch.float64, generator=generator)
    keys = torch.rand(2, 41, generator=generator) < 0.7
    rows = ops.spread_queries(40, 6, grid=GRID, prefix=1, has_cls=has_cls)
    assert len(rows) <= 6 + has_cls and (rows[0] == 0) == has_cls
    found = ops.drawn_attention(q, k, rows, scale=0.3, keys=keys, first_half=has_cls)
    for b in range(2):
        pattern = (0.3 * q[b] @ k[b].mT).masked_fill(~keys[b], -torch.inf).softmax(-1)
        weights = [0.5 if has_cls and r == 0 else 1 / len(rows) for r in rows]
        if has_cls:
            weights[1:] = [0.5 / (len(rows) - 1)] * (len(rows) - 1)
        weights = [w * bool(keys[b, r]) for w, r in zip(weights, rows, strict=True)]
        total = sum(w * pattern[:, r] for w, r in zip(weights, rows, strict=True)) / sum(weights)
        torch.testing.assert_close(found[b], total)


@every_sampler
def test_heads_may_have_landmarks_of_their_own(name):
    from fna_lab.attn.base import Context
    from fna_lab.attn.fna import FastNystromAttention
    from fna_lab.attn.subset import SubsetAttention

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 41, 8, dtype=torch.float64, generator=generator)
    keep = torch.rand(2, 1, 1, 41, generator=generator) < 0.8
    keep[..., 0] = True
    massive = torch.zeros(2, 41, dtype=torch.bool)
    massive[0, 7] = massive[1, [9, 11]] = True
    for source in ("q", "k", "qk"):
        for variant in (FastNystromAttention, SubsetAttention):
            settings = dict(num_landmarks=9, source=source, landmarks=SAMPLERS[name]())
            settings |= dict(guarantee=["cls", "massive"])
            many = variant(**settings, per_head=True)
            for mask in (None, keep):
                more = dict(layer=0, nth=0, scale=8**-0.5, num_prefix_tokens=1, has_cls=True)
                more |= dict(grid=GRID, attn_mask=mask, classes={"massive": massive})
                x = torch.randn(2, 41, 32, generator=generator)
                out = many(q, k, v, Context(x=x, **more))
                # Of a single head, shared landmarks are its own.
                one = [
                    variant(**settings)(
                        *(t[:, h : h + 1] for t in (q, k, v)), Context(x=x, **more)
                    )
                    for h in range(4)
                ]
                torch.testing.assert_close(out, torch.cat(one, dim=1), rtol=1e-4, atol=1e-5)


def test_heads_differ_in_queries_and_keys_alone():
    from fna_lab.attn.fna import FastNystromAttention

    with pytest.raises(ValueError, match="attn.per_head=true with attn.source=normed.*q, k, qk"):
        FastNystromAttention(per_head=True, source="normed")
    one = FastNystromAttention(source="k")
    many = FastNystromAttention(source="k", per_head=True)
    shape = dict(heads=6, head_dim=64, channels=384, layers=2)
    heads, together = many.selection_flops(1370, 64, 64), one.selection_flops(1370, 384, 64)
    assert many.flops(1370, **shape) - one.flops(1370, **shape) == 2 * (6 * heads - together)


def test_landmarks_of_the_wrong_shape_are_named():
    q = torch.randn(2, 4, 41, 8)
    for wrong in (torch.zeros(3, 6).long(), torch.zeros(2, 3, 6).long(), torch.zeros(6).long()):
        with pytest.raises(ValueError, match=r"landmarks .*\[b|landmarks \[2 m\]"):
            ops.nystrom_attention(q, q, q, wrong)


def test_farthest_points_leave_cls_to_its_distance_where_nothing_is_guaranteed():
    points = tokens(1)
    points[:, 0] = points[:, 1:].mean(1)  # CLS stands out least
    sampler = FarthestPointLandmarks()
    none = torch.zeros(len(points), 0, dtype=torch.long)
    more = dict(allowed=None, num_prefix_tokens=1, grid=None)
    picks = sampler(points, 8, guaranteed=none, **more)
    assert (picks[:, 0] == 1).all() and not (picks == 0).any()
    allowed = torch.ones(points.shape[:2], dtype=torch.bool)
    allowed[:, :4] = False
    picks = sampler(points, 8, guaranteed=none, **more | {"allowed": allowed})
    assert (picks[:, 0] == 4).all()


@pytest.mark.parametrize(
    "sampler", [SAMPLERS["fps"](block=5), SAMPLERS["grid_fps"](), SAMPLERS["joint"]()]
)
@pytest.mark.parametrize("barred", [3, 30])
def test_with_a_promise_of_barred_tokens_none_of_them_is_taken(sampler, barred):
    points = tokens(1)
    order = torch.rand(3, points.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    gone = order.argsort(1)[:, :barred] + 1  # CLS stays
    allowed = torch.ones(points.shape[:2], dtype=torch.bool).scatter_(1, gone, False)
    settings = dict(allowed=allowed, num_prefix_tokens=1, grid=GRID)
    num = min(16, points.shape[1] - barred)
    picks = sampler.promised(barred)(
        points, num, guaranteed=torch.zeros(3, 1, dtype=torch.long), **settings
    )
    assert allowed.gather(1, picks).all()
    assert all(len(set(row)) == num for row in picks.tolist())
    assert sampler.barred is None  # the promise is the other's
