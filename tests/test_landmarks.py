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
    return SAMPLERS[name]()(
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
def test_forbidden_tokens_are_out(name):
    allowed = torch.rand(3, 41, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[:, 0] = True
    picks = choose(name, tokens(1), 12, guaranteed=torch.zeros(3, 1).long(), allowed=allowed)
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
