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


@pytest.mark.parametrize("solver", ["newton_schulz", "ridge", "pinv"])
def test_permuted_tokens_give_permuted_outputs(solver):
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    landmarks = torch.stack([torch.randperm(40)[:7] for _ in range(2)])
    order = torch.randperm(40)
    place = order.argsort()  # where each token went
    out = ops.nystrom_attention(q, k, v, landmarks, solver=solver)
    moved = ops.nystrom_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], place[landmarks], solver=solver
    )
    torch.testing.assert_close(moved, out[:, :, order])


@pytest.mark.parametrize("solver", ["newton_schulz", "ridge", "pinv"])
def test_gradients_are_those_of_finite_differences(solver):
    torch.manual_seed(0)
    qkv = [torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    landmarks = torch.tensor([[0, 3, 5, 8]])

    def run(*args):
        return ops.nystrom_attention(*args, landmarks, solver=solver, iters=4)

    assert torch.autograd.gradcheck(run, qkv, eps=1e-6, atol=1e-5)


def test_farthest_points_follow_their_tokens_and_not_their_mates():
    points = torch.randn(3, 50, 6, dtype=torch.float64)
    start = torch.tensor([4, 0, 17])
    picks = ops.farthest_points(points, 12, start=start)
    order = torch.randperm(50)
    moved = ops.farthest_points(points[:, order], 12, start=order.argsort()[start])
    assert torch.equal(order[moved], picks)
    alone = ops.farthest_points(points[1:2], 12, start=start[1:2])
    assert torch.equal(alone, picks[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
def test_farthest_points_of_extreme_points_are_distinct(dtype, size):
    points = (size * torch.randn(2, 30, 16)).to(dtype)
    picks = ops.farthest_points(points, 10)
    assert all(len(set(row.tolist())) == 10 for row in picks)


def test_exact_rows_are_those_of_exact_attention_and_no_others_change():
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    landmarks = torch.tensor([[0, 9, 21, 30], [0, 4, 5, 39]])
    plain = ops.nystrom_attention(q, k, v, landmarks)
    out = ops.nystrom_attention(q, k, v, landmarks, exact_rows=2)
    exact = ops.attention(q, k, v)
    for b in range(2):
        rows = landmarks[b, :2]
        torch.testing.assert_close(out[b, :, rows], exact[b, :, rows])
        others = [i for i in range(40) if i not in rows.tolist()]
        assert torch.equal(out[b, :, others], plain[b, :, others])
    assert not torch.allclose(plain, out)


def test_exact_rows_have_gradients():
    torch.manual_seed(0)
    qkv = [torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    landmarks = torch.tensor([[0, 3, 5, 8]])

    def run(*args):
        return ops.nystrom_attention(*args, landmarks, solver="ridge", exact_rows=1)

    assert torch.autograd.gradcheck(run, qkv, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 12])
@pytest.mark.parametrize("per_head", [False, True])
def test_landmarks_that_would_lie_in_another_picture_are_refused(wrong, per_head):
    q, k, v = torch.randn(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)  # packed, as hosts make them
    marks = torch.tensor([[0, wrong], [0, 1]])
    marks = marks[:, None].expand(-1, 2, -1) if per_head else marks
    members = torch.zeros(*marks.shape[:-1], 12, dtype=torch.long)
    for call in (
        lambda: ops.subset_attention(q, k, v, marks),
        lambda: ops.nystrom_attention(q, k, v, marks),
        lambda: ops.clustered_attention(q, k, v, marks, members, lambda a, b: b),
    ):
        with pytest.raises(ValueError, match="Expected landmarks from 0 to 11, got"):
            call()
    points = torch.randn(2, 12, 4)
    with pytest.raises(ValueError, match="Expected picks from 0 to 11"):
        ops.coverage_radius(points, torch.tensor([[0, wrong], [0, 1]]))
    with pytest.raises(ValueError, match="Expected first from 0 to 11"):
        ops.farthest_points(points, 3, first=torch.tensor([[wrong], [1]]))
