"""Exact attention: the reference of every variant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_qkv, check_same_device


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, keep: Tensor | None = None
) -> Tensor:
    """Exact attention, softmax(scale q k') v.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        scale: factor of the logits; None = d^-1/2.
        keep: True = may attend; `[b m n]`, `[b 1 m n]` or `[b 1 1 n]`. A row that may attend to
            nothing gives zeros.

    Returns:
        `[b h m d]`.

    Raises:
        TypeError: an argument is not a tensor, or `keep` is not boolean.
        ValueError: shapes do not fit.

    Source: Vaswani et al. 2017, equation 1.
    """
    check_qkv(q, k, v)
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if keep.dtype != torch.bool:
        raise TypeError(f"Expected keep to be a bool tensor, got {keep.dtype}.")
    if keep.ndim == 3:
        keep = keep[:, None]
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if keep.ndim != 4 or any(a not in (1, b) for a, b in zip(keep.shape, shape, strict=True)):
        raise ValueError(
            f"Expected keep to broadcast to [b h m n] = {shape}, got {tuple(keep.shape)}."
        )
    check_same_device(q=q, keep=keep)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
    # The kernels disagree on rows without a key: some give NaN.
    return out.masked_fill(~keep.any(-1, keepdim=True), 0)
