"""Patterns and stages: published values, and the cheap forms against the written-out matrix."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fna_lab import ops
from fna_lab.ops.patterns import _dense

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "reference.npz")


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def inputs():
    return [reference(f"mask_{x}") for x in ("q", "k", "v", "tokens")]


@pytest.mark.parametrize("pattern", ops.PATTERNS)
def test_removed_pairs_gives_the_published_pairs(pattern):
    found = ops.removed_pairs(reference("mask_tokens"), pattern)
    assert torch.equal(found, reference(f"mask_{pattern}_removed"))
    some = slice(1, 4)
    assert torch.equal(
        ops.removed_pairs(reference("mask_tokens"), pattern, some).expand_as(found[:, some]),
        found[:, some],
    )


@pytest.mark.parametrize("pattern", ops.PATTERNS)
@pytest.mark.parametrize(("stage", "key"), [("mask", "pre_out"), ("sink", "post_out")])
def test_masked_attention_gives_the_published_values(pattern, stage, key):
    if stage == "mask" and pattern in ("t_to_x", "x_to_x"):
        assert f"mask_{pattern}_{key}" not in REFERENCE
        with pytest.raises(ValueError, match="whole rows"):
            ops.masked_attention(*inputs(), pattern=pattern, stage=stage)
        return
    out = ops.masked_attention(*inputs(), pattern=pattern, stage=stage)
    torch.testing.assert_close(out, reference(f"mask_{pattern}_{key}"), rtol=1e-6, atol=1e-9)


def random_case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, 9, 4, generator=generator, dtype=dtype) for _ in range(3))
    tokens = torch.zeros(3, 9, dtype=torch.bool)
    tokens[0, [2, 5]] = True
    tokens[1, 8] = True  # the third picture has none
    return q, k, v, tokens


@pytest.mark.parametrize("pattern", ["type1", "type2"])
@pytest.mark.parametrize("stage", ops.STAGES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_cheap_forms_equal_the_written_out_matrix(pattern, stage, biased):
    q, k, v, tokens = random_case()
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64) if biased else None
    out = ops.masked_attention(q, k, v, tokens, pattern=pattern, stage=stage, scale=0.3, bias=bias)
    dense = _dense(q, k, v, ops.removed_pairs(tokens, pattern), stage, 0.3, bias)
    torch.testing.assert_close(out, dense)
    for i in range(3):
        alone = ops.masked_attention(
            *(x[i : i + 1] for x in (q, k, v, tokens)),
            pattern=pattern,
            stage=stage,
            scale=0.3,
            bias=bias,
        )
        torch.testing.assert_close(out[i : i + 1], alone)


@pytest.mark.parametrize("pattern", ["type1", "type2"])
@pytest.mark.parametrize("stage", ops.STAGES)
def test_an_empty_set_changes_nothing(pattern, stage):
    q, k, v, tokens = random_case()
    out = ops.masked_attention(q, k, v, torch.zeros_like(tokens), pattern=pattern, stage=stage)
    torch.testing.assert_close(out, ops.attention(q, k, v))


@pytest.mark.parametrize("pattern", ["type1", "type2"])
@pytest.mark.parametrize("stage", ops.STAGES)
def test_the_cheap_forms_have_gradients(pattern, stage):
    q, k, v, tokens = random_case()
    args = [x.requires_grad_() for x in (q, k, v)]

    def f(q, k, v):
        return ops.masked_attention(q, k, v, tokens, pattern=pattern, stage=stage)

    assert torch.autograd.gradcheck(f, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", ops.STAGES)
def test_extreme_logits_stay_finite(dtype, stage):
    q, k, v, tokens = random_case(torch.float32)
    q, k, v = ((50 * x).to(dtype) for x in (q, k, v))
    for pattern in ("type1", "type2"):
        out = ops.masked_attention(q, k, v, tokens, pattern=pattern, stage=stage)
        assert out.dtype == dtype and torch.isfinite(out).all()


def test_a_row_without_a_key_gives_zeros():
    q, k, v, tokens = random_case()
    everything = torch.ones_like(tokens)
    out = ops.masked_attention(q, k, v, everything, pattern="type1", stage="mask")
    assert (out == 0).all()
    keep = torch.ones(3, 9, 9, dtype=torch.bool)
    keep[:, 4] = False
    out = ops.attention(q, k, v, keep=keep)
    assert (out[:, :, 4] == 0).all() and (out[:, :, 3] != 0).any()


def test_keep_takes_the_three_shapes():
    q, k, v, tokens = random_case()
    keep = ~tokens
    full = keep[:, None].expand(-1, 9, -1)
    expected = ops.attention(q, k, v, keep=full)
    assert torch.equal(expected, ops.attention(q, k, v, keep=full[:, None]))
    torch.testing.assert_close(expected, ops.attention(q, k, v, keep=keep[:, None, None]))


def test_wrong_arguments_are_named():
    q, k, v, tokens = random_case()
    with pytest.raises(ValueError, match="pattern to be one of .*got 'type3'"):
        ops.removed_pairs(tokens, "type3")
    with pytest.raises(TypeError, match="tokens to be a bool tensor"):
        ops.removed_pairs(tokens.long(), "type1")
    with pytest.raises(ValueError, match="stage to be one of mask, sink, got 'pre'"):
        ops.masked_attention(q, k, v, tokens, pattern="type1", stage="pre")
    with pytest.raises(TypeError, match="keep to be a bool tensor"):
        ops.attention(q, k, v, keep=tokens[:, None].float())
    with pytest.raises(ValueError, match="keep to broadcast"):
        ops.attention(q, k, v, keep=tokens[:, None, :5])
    with pytest.raises(ValueError, match="to fit, got"):
        ops.attention(q, k[:, :1], v)


@pytest.mark.parametrize("stage", ["mask", "sink"])
@pytest.mark.parametrize("pattern", ["type1", "type2"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_known_rows_change_nothing(stage, pattern, batch, biased):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, 2, 30, 8, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    bias = torch.randn(1, 2, 30, 30, dtype=torch.float64, generator=generator) if biased else None
    tokens = torch.rand(batch, 30, generator=generator) < 0.2
    tokens[:, 7] = True
    logits = q @ k.mT * 8**-0.5 + (0 if bias is None else bias)
    gone = ops.removed_pairs(tokens, pattern)[:, None]
    if stage == "mask":
        weights = logits.masked_fill(gone, -torch.inf).softmax(-1)
    else:
        weights = logits.softmax(-1).masked_fill(gone, 0)
    kept = v.clone()
    for rows in (None, ops.token_rows(tokens)):
        out = ops.masked_attention(
            q, k, v, tokens, pattern=pattern, stage=stage, bias=bias, rows=rows
        )
        torch.testing.assert_close(out, weights @ v)
    assert torch.equal(v, kept)  # the host's values are its own
    nobody = torch.zeros(batch, 30, dtype=torch.bool)
    out = ops.masked_attention(
        q, k, v, nobody, pattern=pattern, stage=stage, bias=bias, rows=ops.token_rows(nobody)
    )
    torch.testing.assert_close(out, logits.softmax(-1) @ v)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_picture_without_any_key_gives_zeros(batch):
    q, k, v = (torch.randn(batch, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    tokens = torch.ones(batch, 6, dtype=torch.bool)
    tokens[1:, 0] = False
    rows = ops.token_rows(tokens)
    out = ops.masked_attention(q, k, v, tokens, pattern="type1", stage="mask", rows=rows)
    assert (out[0] == 0).all() and (out[1:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ops.PATTERNS)
def test_large_logits_in_half_precision(dtype, pattern):
    q, k, v = (20 * torch.randn(2, 2, 7, 8).to(dtype) for _ in range(3))
    tokens = torch.zeros(2, 7, dtype=torch.bool)
    tokens[:, [2, 5]] = True
    found = ops.masked_attention(q, k, v, tokens, pattern=pattern, stage="sink")
    weights = (8**-0.5 * q.double() @ k.double().mT).softmax(-1)
    wanted = weights.masked_fill(ops.removed_pairs(tokens, pattern)[:, None], 0) @ v.double()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.01 * float(v.abs().max()))


@pytest.mark.parametrize("stage", ops.STAGES)
@pytest.mark.parametrize("biased", [False, True])
def test_own_rows_do_not_depend_on_what_the_kernel_tells(stage, biased):
    q, k, v, tokens = random_case()
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64) if biased else None
    more = {"pattern": "type2", "stage": stage, "scale": 0.3, "bias": bias}
    more["rows"] = ops.token_rows(tokens)
    told = ops.masked_attention(q, k, v, tokens, **more)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(ops.masked_attention(q, k, v, tokens, **more), told)


@pytest.mark.parametrize("stage", ops.STAGES)
def test_a_bias_without_batch_or_with_a_gradient(stage):
    # The kernel that tells its sums takes neither.
    q, k, v, tokens = random_case()
    rows = ops.token_rows(tokens)
    bias = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    out = ops.masked_attention(
        q, k, v, tokens, pattern="type2", stage=stage, scale=0.3, bias=bias, rows=rows
    )
    dense = _dense(q, k, v, ops.removed_pairs(tokens, "type2"), stage, 0.3, bias)
    torch.testing.assert_close(out, dense)
    found, wanted = (torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, dense))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("stage", ops.STAGES)
def test_own_rows_under_autocast(stage):
    q, k, v, tokens = random_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.masked_attention(q, k, v, tokens, pattern="type2", stage=stage, scale=0.3)
    dense = _dense(q, k, v, ops.removed_pairs(tokens, "type2"), stage, 0.3, None)
    torch.testing.assert_close(out.float(), dense, rtol=0, atol=0.03)
