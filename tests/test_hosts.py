"""The parts of a block, on every host family: taken away, they take away what they should."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, build

import fna_lab
from fna_lab.attn.base import AttentionVariant
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.without_bias import WithoutBias
from fna_lab.hosts import mlp_output, out_projection, out_weight

every_host = pytest.mark.parametrize("name", HOSTS)


class Nothing(AttentionVariant):
    """Attention that gives zeros."""

    def __call__(self, q, k, v, context):
        return torch.zeros_like(v)


@every_host
def test_a_block_without_its_two_outputs_is_the_identity(name):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    seen = []
    for block in blocks:
        mlp = mlp_output(block)
        assert mlp.in_features > mlp.out_features
        for layer in (out_projection(block), mlp):
            layer.weight.zero_()
            layer.bias.zero_()
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    host.run(model, x)
    for before, after in seen:
        after = after[0] if isinstance(after, tuple) else after
        torch.testing.assert_close(after, before)


@every_host
def test_the_output_projection_is_what_follows_attention(name):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    with fna_lab.patch(model, Nothing(), layers="all"):
        silent = host.run(model, x)
    for block in blocks:
        out_projection(block).weight.zero_()
    torch.testing.assert_close(host.run(model, x), silent, rtol=1e-4, atol=1e-5)


@every_host
def test_the_out_weight_carries_attention_to_the_residual_stream(name):
    """Without an MLP, a block adds the scaled projection of its attention and nothing else."""
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    noted = {}

    def watch(q, k, v, context):
        weights = (context.scale * q @ k.mT).softmax(-1) if context.attn_mask is None else (
            (context.scale * q @ k.mT + context.attn_mask).softmax(-1)
        )  # fmt: skip
        noted[context.layer] = (weights @ v).transpose(1, 2).flatten(2)

    ends = []
    for block in blocks:
        for key, value in block.named_parameters():
            if key.startswith(("ls1.", "ls_1.", "layer_scale1.", "gamma_1")):
                value.uniform_(0.5, 2.0)
        mlp_output(block).weight.zero_()
        mlp_output(block).bias.zero_()

        def keep(_, args, out):
            ends.append((args[0], out[0] if isinstance(out, tuple) else out))

        block.register_forward_hook(keep)
    with (
        fna_lab.patch(model, "exact", layers="all") as patched,
        patched.observed(watch),
        WithoutBias(out_projection(block) for block in blocks),
    ):
        host.run(model, x)
    for layer, (block, (before, after)) in enumerate(zip(blocks, ends, strict=True)):
        wanted = noted[layer] @ out_weight(block).mT
        torch.testing.assert_close(after - before, wanted, rtol=1e-3, atol=1e-4)


@every_host
def test_a_bias_that_is_left_out_comes_back(name):
    host, model, x = build(name)
    _, blocks = find_blocks(model)
    for block in blocks:
        out_projection(block).bias.normal_()
    before = host.run(model, x)
    with (
        fna_lab.patch(model, "exact", layers="all"),
        WithoutBias(out_projection(block) for block in blocks),
    ):
        without = host.run(model, x)
    assert torch.equal(host.run(model, x), before)
    for block in blocks:
        out_projection(block).bias.zero_()
    torch.testing.assert_close(host.run(model, x), without, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, without)
