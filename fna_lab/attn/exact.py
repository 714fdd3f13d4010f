"""Exact attention, through the seam: the reference, and the carrier of every mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context, attend_without


class ExactAttention(AttentionVariant):
    """The host's own attention, and the same without the pairs that a mask takes away."""

    patterns = ops.PATTERNS
    reweighs = True
    extends = True
    joins = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        bias, removal = context.attn_mask, context.removal
        if context.reweigh is not None:
            weights = ops.attention_pattern(q, k, scale=context.scale, bias=bias)
            return context.reweigh(weights).to(v.dtype) @ v
        if removal is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=context.scale)
        return attend_without(removal, q, k, v, context)
