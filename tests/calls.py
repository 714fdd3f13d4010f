"""One attention call as the seam makes it, for tests of variants."""

from __future__ import annotations

import pytest
import torch

from fna_lab.attn.base import Context


def call(prefix=1, has_cls=True, **more):
    """q, k, v of 4 x 6 patches, and what the seam would tell."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, prefix + 24, 8, dtype=torch.float64)
    context = Context(
        layer=1,
        nth=0,
        scale=8**-0.5,
        x=torch.randn(2, prefix + 24, 16, dtype=torch.float64),
        num_prefix_tokens=prefix,
        has_cls=has_cls,
        grid=(4, 6),
        **more,
    )
    return q, k, v, context


KEEP = (torch.arange(25) % 5 != 3).expand(2, 1, 1, -1)
BIAS = torch.randn(1, 3, 25, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
every_mask = pytest.mark.parametrize("mask", [None, KEEP, BIAS], ids=["none", "padding", "bias"])


def weights(q, k, context):
    logits = context.scale * q @ k.mT
    mask = context.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    return logits
