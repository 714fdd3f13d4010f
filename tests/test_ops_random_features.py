"""Attention by random features: the formula written out, and what it estimates."""

import pytest
import torch

from fna_lab import ops


def random_qkv(dtype=torch.float64, size=1.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 30, 8, generator=generator, dtype=torch.float64)
    return (size * q).to(dtype), (size * k).to(dtype), v.to(dtype)


def slow(q, k, v, features, scale, keep):
    def phi(x):
        x = x * scale**0.5
        return (x @ features.T - x.square().sum(-1, keepdim=True) / 2).exp()

    weights = phi(q) @ phi(k).mT * keep
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_it_is_the_formula(masked, told, monkeypatch):
    if not told:  # as where the fused kernel keeps its sums for itself
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    q, k, v = random_qkv()
    features = ops.orthogonal_features(20, 8)
    keys = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) > 0.4
    out = ops.performer_attention(q, k, v, features, scale=0.3, keys=keys if masked else None)
    keep = keys[:, None, None] if masked else torch.ones(())
    torch.testing.assert_close(out, slow(q, k, v, features.double(), 0.3, keep))


def test_many_features_come_to_exact_attention():
    q, k, v = random_qkv(size=0.5)
    exact = ops.attention(q, k, v)

    def error(num):
        out = ops.performer_attention(q, k, v, ops.orthogonal_features(num, 8))
        return ((out - exact).norm() / exact.norm()).item()

    assert error(16384) < 0.02 < 0.1 < error(16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_far_queries_and_keys_stay_finite(dtype, size):
    q, k, v = random_qkv(dtype, size)
    out = ops.performer_attention(q, k, v, ops.orthogonal_features(20, 8))
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.amax(2) <= v.amax(2) + 0.01).all()  # means of values


def test_a_picture_without_keys_gives_zeros_and_changes_no_other():
    q, k, v = random_qkv()
    keys = torch.ones(2, 30, dtype=torch.bool)
    keys[1] = False
    features = ops.orthogonal_features(20, 8)
    out = ops.performer_attention(q, k, v, features, keys=keys)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[:1], ops.performer_attention(q[:1], k[:1], v[:1], features))
    parts = [part.detach().requires_grad_() for part in (q, k, v)]
    ops.performer_attention(*parts, features, keys=keys).square().sum().backward()
    for part in parts:
        assert part.grad is not None and part.grad.isfinite().all() and (part.grad[1] == 0).all()


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:1, :1, :5].requires_grad_() for x in random_qkv())
    features = ops.orthogonal_features(4, 8)
    assert torch.autograd.gradcheck(lambda *x: ops.performer_attention(*x, features), (q, k, v))


def test_directions_are_orthogonal_and_as_long_as_gaussian_ones():
    features = ops.orthogonal_features(8 * 500, 8).unflatten(0, (500, 8))
    gram = features @ features.mT
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
    assert abs(features.square().sum(-1).mean().item() - 8) < 0.2


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"Expected features \[r 8\], got \(20, 9\)"):
        ops.performer_attention(*random_qkv(), torch.randn(20, 9))
