"""Exact attention, through the seam: the reference, and the carrier of every mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context


class ExactAttention(AttentionVariant):
    """The host's own attention, and the same without the pairs that a mask takes away."""

    patterns = ops.PATTERNS
    reweighs = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        bias, removal = context.attn_mask, context.removal
        if context.reweigh is not None:
            weights = ops.attention_pattern(q, k, scale=context.scale, bias=bias)
            return context.reweigh(weights).to(v.dtype) @ v
        if removal is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=context.scale)
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -torch.inf)
        return ops.masked_attention(
            q,
            k,
            v,
            removal.tokens,
            pattern=removal.pattern,
            stage=removal.stage,
            scale=context.scale,
            bias=bias,
            rows=(removal.rows, removal.valid),
        )
