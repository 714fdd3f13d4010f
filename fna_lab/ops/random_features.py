"""Softmax attention by positive random features."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_qkv, default_scale


@torch.compiler.assume_constant_result  # a draw by numbers alone: compilers need not see it
def orthogonal_features(num: int, dim: int, *, seed: int = 0) -> Tensor:
    """Gaussian directions, orthogonal in blocks of `dim`, `[num dim]` in float32.

    Source: Choromanski et al. 2021 (Performer).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-num // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        blocks.append((q * r.diagonal().sign()).mT)
    lengths = torch.randn(num, dim, generator=generator).norm(dim=1, keepdim=True)
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

    phi(x) = exp(w x - |x|^2 / 2) for each direction w, of x times the root of the scale; taken in
    float32, with the largest exponent of each query, and of all keys of a head, taken out.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        features: directions w `[r d]`.
        scale: factor of the logits; None = d^-1/2.
        keys: bool `[b n]`, True = may be attended to; None = all.

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
    wide = torch.promote_types(q.dtype, torch.float32)
    features = features.to(device=q.device, dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        logs = []
        for x in (q, k):
            x = x.to(wide) * scale**0.5
            logs.append(x @ features.mT - 0.5 * x.square().sum(-1, keepdim=True))
        query = (logs[0] - logs[0].amax(-1, keepdim=True)).exp()
        if keys is not None:
            check_bool("keys", keys, (q.shape[0], k.shape[2]))
            logs[1] = logs[1].masked_fill(~keys[:, None, :, None], -torch.inf)
        # A maximum of each direction, undone on the query's side, keeps far keys from underflow.
        top = logs[1].amax(2, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        key = (logs[1] - top).exp()
        lift = (top - top.amax(-1, keepdim=True)).exp()
        query = query * lift
        summed = query @ (key.mT @ v.to(wide))
        total = query @ key.sum(2)[..., None]
        return (summed / total.clamp(min=torch.finfo(wide).tiny)).to(v.dtype)
