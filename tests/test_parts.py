"""The parts of a block, on every host family: taken away, they take away what they should."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, build

import fna_lab
from fna_lab.attn.base import AttentionVariant
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.parts import mlp_output, out_projection

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
