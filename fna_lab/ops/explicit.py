"""Attention that is exact for chosen tokens and Nystroem for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import full_precision
from fna_lab.ops.checks import check_bool, check_qkv, default_scale
from fna_lab.ops.nystrom import (
    check_landmarks,
    each_head,
    gather_tokens,
    only_keys,
    repeated_landmarks,
)


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Tensor,
    num_explicit: int,
    solve: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    distinct: bool = True,
) -> Tensor:
    """Rows and columns of explicit tokens are exact, the rest is Nystroem attention; linear in n.

    A query sees explicit keys by their logits, and the other (implicit) keys through landmarks of
    their own. The two parts are weighed by their log-sum-exp. That of the implicit keys is exact
    at landmarks, and for other queries the landmarks' excess over the log-sum-exp of the landmark
    keys, spread as the values are: it takes no n x n product, and is an estimate of our own.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        picks: token indices, long `[b m]` or `[b h m]`: explicit tokens, then landmarks.
        num_explicit: how many of them are explicit; with all m = n, attention is exact.
        solve: (A `[b h p p]`, B `[b h p d]`) -> Z(A) B.
        scale: factor of the logits; None = d^-1/2.
        keys: bool `[b n]`, True = may be attended to; None = all. Picks must be such keys.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing.
        distinct: False where picks may repeat; with `keys` they always may.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: the explicit / implicit split of Fast Nystroem Attention's companion study, which
    takes the log-sum-exp of the implicit keys exactly.
    """
    check_qkv(q, k, v)
    check_landmarks(picks, q)
    if not 1 <= num_explicit <= picks.shape[-1]:
        raise ValueError(
            f"Expected num_explicit from 1 to {picks.shape[-1]}, got {num_explicit!r}."
        )
    if keys is not None:
        check_bool("keys", keys, (q.shape[0], k.shape[2]))
    scale = default_scale(q) if scale is None else scale
    bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    least = torch.finfo(wide).min / 4
    explicit, marks = picks[..., :num_explicit], picks[..., num_explicit:]

    own = only_keys(keys, None) if keys is not None else None
    if bias is not None:
        own = gather_tokens(bias, explicit)
        own = own if keys is None else only_keys(keys, own)
    rows = F.scaled_dot_product_attention(
        gather_tokens(q, explicit), k, v, attn_mask=own, scale=scale
    )
    with full_precision(q):
        asks, answers = q.to(wide), k.to(wide)
        # Queries x picked keys.
        near = scale * (asks @ gather_tokens(answers, picks).mT)
        if bias is not None:
            near = near + gather_tokens(bias.mT, picks).mT
        dead = None
        if keys is not None or not distinct:
            dead = repeated_landmarks(picks)
            near = near.masked_fill(each_head(dead)[:, :, None], least)
        to_explicit, to_marks = near[..., :num_explicit], near[..., num_explicit:]
        values = v.to(wide)
        out = to_explicit.softmax(-1) @ gather_tokens(values, explicit)
        if marks.shape[-1]:
            # Landmark queries x implicit keys.
            far = scale * (gather_tokens(asks, marks) @ answers.mT)
            if bias is not None:
                far = far + gather_tokens(bias, marks)
            hidden = torch.zeros_like(far[:, :, :1]).bool()
            hidden = hidden.scatter(
                3, each_head(explicit)[:, :, None].expand(-1, q.shape[1], -1, -1), True
            )
            if keys is not None:
                hidden = hidden | ~keys[:, None, None]
            far = far.masked_fill(hidden, least)
            corner = gather_tokens(to_marks, marks)
            excess = far.logsumexp(-1, keepdim=True) - corner.logsumexp(-1, keepdim=True)
            known = torch.cat([far.softmax(-1) @ values, excess], dim=-1)
            if dead is not None:
                gone = each_head(dead)[:, :, num_explicit:, None]
                alone = torch.full_like(corner[:1, :1], least).diagonal_scatter(
                    corner.new_zeros(1, 1, corner.shape[-1]), dim1=-2, dim2=-1
                )
                corner = torch.where(gone, alone, corner)
                known = known.masked_fill(gone, 0)
            mixed = to_marks.softmax(-1) @ solve(corner.softmax(-1), known)
            implicit = to_marks.logsumexp(-1, keepdim=True) + mixed[..., -1:]
            share = (to_explicit.logsumexp(-1, keepdim=True) - implicit).sigmoid()
            out = share * out + (1 - share) * mixed[..., :-1]
    index = each_head(explicit)[..., None].expand_as(rows)
    return out.to(v.dtype).scatter(2, index, rows.to(v.dtype))
