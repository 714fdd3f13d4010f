"""The settings of `attn=fna` that decide how it is computed."""

import pytest
import torch

from fna_lab import ops
from fna_lab.attn.base import Context, Removal
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver
from fna_lab.attn.solver.pinv import PinvSolver


def run(variant, tokens=37, dtype=torch.float64, mask=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, tokens, 8, generator=generator, dtype=dtype)
    x = torch.randn(2, tokens, 32, generator=generator, dtype=dtype)
    context = Context(
        layer=0, nth=0, scale=8**-0.5, x=x, num_prefix_tokens=1, has_cls=True, grid=(6, 6),
        attn_mask=mask,
    )  # fmt: skip
    keep = None if mask is None else mask.expand(2, -1, tokens, -1)[:, 0]
    return variant(q, k, v, context), ops.attention(q, k, v, keep=keep)


@pytest.mark.parametrize("source", ["input", "normed", "q", "k", "qk"])
@pytest.mark.parametrize("rows", [0.3, 1, 2])
@pytest.mark.parametrize("sketch", [None, 5])
def test_every_token_a_landmark_is_exact_attention(source, rows, sketch):
    variant = FastNystromAttention(
        num_landmarks=37, source=source, rows=rows, sketch=sketch, solver=PinvSolver()
    )
    torch.testing.assert_close(*run(variant))


@pytest.mark.parametrize("rows", [0.5, 1, 3])
def test_every_kept_token_a_landmark_is_exact_under_padding(rows):
    mask = (torch.arange(37) < 20).expand(2, 1, 1, -1)
    variant = FastNystromAttention(num_landmarks=25, rows=rows, solver=PinvSolver())
    torch.testing.assert_close(*run(variant, mask=mask))


@pytest.mark.parametrize("masked", [False, True])
def test_more_rows_are_closer(masked):
    mask = (torch.arange(37) != 11).expand(2, 1, 1, -1) if masked else None

    def error(rows):
        out, exact = run(FastNystromAttention(num_landmarks=12, rows=rows), mask=mask)
        return (out - exact).norm()

    assert error(3) < error(1) < error(0.5) < error(0.1)


def test_half_the_landmarks_are_fitted_where_the_solver_can():
    marks = torch.arange(90).expand(2, -1)

    def fitted(num, **settings):
        found = FastNystromAttention(**settings)._fitted(marks[:, :num], None, 100)
        return list(range(num)) if found is None else found[1].tolist()

    assert fitted(90) == list(range(0, 90, 2))
    assert fitted(40) == [i * 40 // 32 for i in range(32)] and fitted(20) == list(range(20))
    assert fitted(90, solver=NewtonSchulzSolver()) == list(range(90))
    assert fitted(90, clusters=False) == list(range(90))
    assert fitted(20, rows=0.5) == list(range(0, 20, 2))
    assert fitted(20, rows=0.3) == [0, 3, 6, 10, 13, 16] and fitted(20, rows=0.01) == [0]
    assert fitted(20, rows=1.5)[:20] == list(range(20)) and len(fitted(20, rows=1.5)) == 30


def test_without_clusters_it_is_the_plain_chain(monkeypatch):
    variant = FastNystromAttention(num_landmarks=9, clusters=False, exact_cls=False)
    seen = []
    renewed = variant.renewed

    def listen(*args):
        seen.append((args, renewed(*args)))
        return seen[-1][1]

    monkeypatch.setattr(variant, "renewed", listen)
    out, _ = run(variant)
    (q, k, *_), landmarks = seen[0]
    v = torch.randn(3, 2, 4, 37, 8, generator=torch.Generator().manual_seed(0), dtype=q.dtype)[2]
    expected = ops.nystrom_attention(q, k, v, landmarks, solver="ridge", scale=8**-0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rows=0), "attn.rows=0: expected a number > 0"),
        (dict(rows=2, clusters=False), "attn.rows=2: expected 1 or null with attn.clusters=false"),
        (dict(rows=2, solver=NewtonSchulzSolver()), "attn.rows=2: .* use attn/solver=ridge"),
        (dict(rows="half"), "attn.rows='half': expected a number > 0"),
        (dict(sketch=0), "attn.sketch=0: expected"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        FastNystromAttention(**settings)


def test_cost_grows_with_rows():
    def flops(**settings):
        variant = FastNystromAttention(**settings)
        return variant.flops(1370, heads=6, head_dim=64, channels=384, layers=6)

    thin = 6 * ops.subset_flops(1370, 6, 64, 64)
    assert thin < flops(rows=2) - flops(rows=1) < 1.1 * thin
    assert 0.5 * thin < flops(rows=1) - flops() < 0.6 * thin
    assert 1.5 * thin < flops() < 3 * thin


def masked(pattern, stage, *, pad=0, dtype=torch.float64, **settings):
    """The variant under a mask, exact attention under it, and T."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 37, 8, generator=generator, dtype=dtype)
    k[0, :, 19] = 3 * q[0, :, 19]  # attends to itself
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[:, 37 - pad :] = False
    gone = torch.zeros(2, 37, dtype=torch.bool)
    gone[0, [4, 19, 30]] = True  # pictures differ in how many
    gone[1, 7] = True
    gone &= keep
    taken = Removal(gone, pattern, stage, *ops.token_rows(gone))
    context = Context(
        layer=0, nth=0, scale=8**-0.5, x=q.new_zeros(2, 37, 32), num_prefix_tokens=1, has_cls=True,
        grid=(6, 6), attn_mask=keep[:, None, None] if pad else None, removal=taken,
    )  # fmt: skip
    out = FastNystromAttention(**settings)(q, k, v, context)
    bias = torch.zeros(2, 1, 1, 37, dtype=dtype).masked_fill(~keep[:, None, None], -torch.inf)
    exact = ops.masked_attention(
        q, k, v, gone, pattern=pattern, stage=stage, scale=8**-0.5, bias=bias
    )
    return out, exact, gone, keep


every_mask = pytest.mark.parametrize(
    ("pattern", "stage"),
    [("type1", "mask"), ("type1", "sink"), ("type2", "mask"), ("type2", "sink")],
)


@every_mask
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pad", [0, 9])
def test_every_kept_token_a_landmark_is_exact_under_a_mask(pattern, stage, per_head, pad):
    left = 37 - pad - (1 if stage == "mask" else 0)  # they repeat where more are removed
    out, exact, _, keep = masked(
        pattern, stage, pad=pad, num_landmarks=left, per_head=per_head, solver=PinvSolver(),
        landmarks=FarthestPointLandmarks(),
    )  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2)[keep], exact.transpose(1, 2)[keep])


@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_tokens_that_see_themselves_are_as_close_as_others(stage):
    out, exact, gone, _ = masked("type2", stage, num_landmarks=18)
    error = (out - exact).norm(dim=-1).mean(1)  # [b n]
    assert error[gone].mean() < 2 * error[~gone].mean()  # half of these are landmarks, and exact
    first, _, _, _ = masked("type1", stage, num_landmarks=18)
    unlike = (first - exact).norm(dim=-1).mean(1)
    assert error[0, 19] < 0.1 and unlike[0, 19] > 2  # so the bound says something
    torch.testing.assert_close(
        first.transpose(1, 2)[~gone], out.transpose(1, 2)[~gone], rtol=0, atol=0
    )
