"""Softmax attention by positive random features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import attention_logits, attention_with_lse, full_precision
from fna_lab.ops.checks import check_bool, check_qkv, default_scale
from fna_lab.ops.draws import drawn_once


def orthogonal_features(num: int, dim: int, *, seed: int = 0) -> Tensor:
    """Gaussian directions, orthogonal in blocks of `dim`, `[num dim]` in float32.

    Source: Choromanski et al. 2021 (Performer).
    """
    return _directions(num, dim, seed).clone()


@drawn_once
def _directions(num: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    how: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    blocks = []
    for _ in range(-(-num // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, **how))
        blocks.append((q * r.diagonal().sign()).mT)
    lengths = torch.randn(num, dim, **how).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num] * lengths


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    *,
    scale: float | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Attention that is linear in n: phi(Q) (phi(K)' V) / phi(Q) (phi(K)' 1).

    phi(x) = exp(w x - |x|^2 / 2) for each direction w, of x times the root of the scale. That is
    fused attention twice: of the directions to the keys, biased by -|k|^2 / 2, and of the queries
    to the directions, biased by the log of the sums that the first one divided by. Neither
    features nor weights are written out, and no exponent can overflow. In at least float32.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        features: directions w `[r d]`.
        scale: factor of the logits; None = d^-1/2.
        keys: bool `[b n]`, True = may be attended to; None = all. A picture without any gives
            zeros.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: Choromanski et al. 2021 (Performer), positive features.
    """
    check_qkv(q, k, v)
    scale = default_scale(q) if scale is None else scale
    if features.ndim != 2 or features.shape[1] != q.shape[3]:
        raise ValueError(f"Expected features [r {q.shape[3]}], got {tuple(features.shape)}.")
    if keys is not None:
        check_bool("keys", keys, (q.shape[0], k.shape[2]))
    wide, dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    with full_precision(q):
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        directions = features.to(q).expand(*q.shape[:2], -1, -1)
        bias = (-0.5 * scale * k.square().sum(-1))[:, :, None]  # [b h 1 n]
        if keys is not None:
            # A picture without keys keeps all of them: its rows come out as zero below.
            mine = keys | ~keys.any(1, keepdim=True)
            bias = bias.masked_fill(~mine[:, None, None], -torch.inf)
        values, sums = attention_with_lse(directions, k, v, scale=scale**0.5, mask=bias)
        if sums is None:  # the kernel does not say
            sums = (attention_logits(directions, k, scale**0.5) + bias).logsumexp(-1)
        out = F.scaled_dot_product_attention(
            q, directions, values, attn_mask=sums[:, :, None], scale=scale**0.5
        )
    if keys is not None:
        out = out.masked_fill(~keys.any(1)[:, None, None, None], 0)
    return out.to(dtype)
