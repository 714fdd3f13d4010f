"""What the kernels of all devices are handed, and what they give."""

from __future__ import annotations

from torch import Tensor


def mask_of_keys(attn_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """An `attn_mask` that is alike for all queries, `[b h n]` for keys `[b h n d]`."""
    return None if attn_mask is None else attn_mask[:, :, 0].expand(k.shape[:3])


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Room for what queries `[b h n d]` get of values `[b h m e]`: a view of `[b n h e]`."""
    batch, heads, size, _ = q.shape
    return q.new_empty((batch, size, heads, v.shape[3])).transpose(1, 2)
