"""Nystroem attention and farthest points: published values, and the laws that they obey."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fna_lab import ops

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "reference.npz")


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def close(out, name):
    torch.testing.assert_close(out, reference(name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["small", "wide", "all"])
def test_nystrom_attention_gives_the_published_values(case):
    q, k, v, marks = (reference(f"nystrom_{case}_{x}") for x in ("q", "k", "v", "landmarks"))
    close(ops.nystrom_attention(q, k, v, marks.long()), f"nystrom_{case}_out")
    close(ops.newton_schulz(reference(f"nystrom_{case}_kernel")), f"nystrom_{case}_kernel_pinv")


@pytest.mark.parametrize("case", ["small", "dup"])
def test_farthest_points_gives_the_published_picks(case):
    points, start, picks = (reference(f"fps_{case}_{x}") for x in ("points", "start", "picks"))
    found = ops.farthest_points(points, picks.shape[1], start=start.long())
    assert torch.equal(found, picks.long())


def random_qkv(batch=2, heads=3, tokens=12, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, dim, generator=generator, dtype=dtype) for _ in range(3)
    ]


def test_every_token_a_landmark_is_exact_attention():
    q, k, v = random_qkv()
    marks = torch.stack([torch.randperm(12), torch.randperm(12)])
    out = ops.nystrom_attention(q, k, v, marks, solver="pinv", scale=0.2)
    torch.testing.assert_close(out, ops.attention(q, k, v, scale=0.2))


def test_every_kept_token_a_landmark_is_exact_masked_attention():
    q, k, v = random_qkv()
    keys = torch.arange(12).expand(2, -1) >= 3
    marks = torch.arange(3, 12).expand(2, -1)
    out = ops.nystrom_attention(q, k, v, marks, solver="pinv", keys=keys)
    torch.testing.assert_close(out, ops.attention(q, k, v, keep=keys[:, None, None]))


def test_every_token_a_landmark_is_exact_attention_with_a_bias():
    q, k, v = random_qkv()
    bias = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    marks = torch.arange(12).expand(2, -1)
    out = ops.nystrom_attention(q, k, v, marks, solver="pinv", bias=bias)
    torch.testing.assert_close(out, ((q @ k.mT) * 8**-0.5 + bias).softmax(-1) @ v)


@pytest.mark.parametrize("solver", ["newton_schulz", "ridge", "pinv"])
def test_a_picture_does_not_see_its_batch_mates(solver):
    q, k, v = random_qkv()
    marks = torch.tensor([[0, 5, 7], [1, 2, 3]])
    both = ops.nystrom_attention(q, k, v, marks, solver=solver)
    alone = ops.nystrom_attention(q[1:], k[1:], v[1:], marks[1:], solver=solver)
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("solver", ["newton_schulz", "ridge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_results_are_finite(solver, dtype, size):
    q, k, v = ((size * x).to(dtype) for x in random_qkv())
    marks = torch.tensor([[0, 5, 7], [1, 1, 3]])
    out = ops.nystrom_attention(q, k, v, marks, solver=solver)
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_allowed_tokens_alone_are_taken():
    points = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    allowed = torch.arange(20).expand(2, -1) % 2 == 1
    picks = ops.farthest_points(points, 6, allowed=allowed)
    assert (picks % 2 == 1).all() and all(len(set(row.tolist())) == 6 for row in picks)


@pytest.mark.parametrize("num", [0, 21, 2.0, True])
def test_a_wrong_number_of_points_is_named(num):
    with pytest.raises(ValueError, match=f"num to be an integer from 1 to 20, got {num!r}"):
        ops.farthest_points(torch.zeros(1, 20, 4), num)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="newton_schulz, ridge, pinv, got 'lu'"):
        ops.nystrom_attention(*random_qkv(), torch.zeros(2, 3, dtype=torch.long), solver="lu")
