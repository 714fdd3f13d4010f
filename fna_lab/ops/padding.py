"""Padding: tokens that are none, as hosts of texts have them behind every short sentence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float

# Hosts write -inf, the least number, -1e9 or -1e4: beside a logit so low no weight is left.
FAR = 9e3


def kept_tokens(attn_mask: Tensor | None) -> Tensor | None:
    """Tokens that are no padding, by the host's padding mask.

    Args:
        attn_mask: bool `[b 1 1 n]`, or `[b 1 n n]` that is the same for all queries (those of
            padding may be kept from everything), True = may be attended to, or float, `FAR` below
            zero or more elsewhere; others and None are no padding masks. Waits for the device
            where the mask is `[b 1 n n]`.

    Returns:
        bool `[b n]`; None = there is no padding mask.
    """
    if attn_mask is None or attn_mask.ndim != 4 or attn_mask.shape[1] != 1:
        return None
    keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -FAR
    if attn_mask.shape[2] == 1 or attn_mask.stride(2) == 0:
        return keep[:, 0, 0]
    if torch.compiler.is_compiling():  # a compiler can only ask how a mask lies
        return None
    keys, square = keep[:, 0].any(1), attn_mask.shape[2] == attn_mask.shape[3]
    first = keys.int().argmax(1) if square else keys.new_zeros(len(keys), dtype=torch.long)
    rows = attn_mask[:, 0]
    same = rows == rows[torch.arange(len(rows), device=rows.device), first][:, None]
    if square:  # padding may be kept from everything
        same |= ~(keys[..., None] | keep[:, 0].any(2, keepdim=True))
    return keys if bool(same.all()) else None


def kept_before(kept: Tensor | None, x: Tensor, extra: int) -> Tensor | None:
    """Kept tokens of the host, where others are appended behind them.

    Args:
        kept: the host's tokens that are no padding, bool `[b n - extra]` or, where the host's mask
            knows of the others, `[b n]`; None = all.
        x: hidden states `[b n c]`.
        extra: how many are appended.

    Returns:
        bool `[b n]`, the appended ones False; None = all are kept and none is appended.

    Raises:
        ValueError: shapes do not fit.
    """
    if not extra:
        return kept
    own = x.shape[1] - extra
    if kept is None:
        kept = torch.ones((x.shape[0], own), dtype=torch.bool, device=x.device)
    if kept.shape[1] not in (own, x.shape[1]):
        raise ValueError(
            f"Expected kept to have {own} or {x.shape[1]} tokens, got {tuple(kept.shape)}."
        )
    return F.pad(kept[:, :own], (0, extra), value=False)


def medians(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Median of each picture, padding left aside: of two middle values the lower one.

    Args:
        values: `[b p]`.
        kept: tokens that are no padding, bool `[b n]` with n >= p, of which `values` are the last;
            None = all.

    Returns:
        `[b 1]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("values", values, 2, "[b p]")
    if kept is None:
        return values.median(1, keepdim=True).values
    mine = patches_of(kept, values)
    return values.masked_fill(~mine, torch.nan).nanmedian(1, keepdim=True).values


def patches_of(kept: Tensor, values: Tensor) -> Tensor:
    """The part of `kept` bool `[b n]` that belongs to values of the last tokens `[b p]`.

    Raises:
        TypeError: `kept` is no bool tensor.
        ValueError: shapes do not fit.
    """
    mine = kept[..., kept.shape[-1] - values.shape[1] :]
    check_bool("kept", mine, tuple(values.shape[:2]))
    return mine


def without_padding_rows(weights: Tensor, kept: Tensor | None, rows: slice) -> Tensor:
    """Attention `[b h r n]` of some rows, 0 in those of padding, which are NaN if it sees nothing.

    `kept` is bool `[b n]`, the tokens that are no padding; None = all.
    """
    return weights if kept is None else weights.masked_fill(~kept[:, None, rows, None], 0)


def num_kept(kept: Tensor | None, num: int) -> Tensor | int:
    """Tokens of each picture that are no padding: bool `[b n]` -> long `[b 1]`; None = `num`."""
    return num if kept is None else kept.sum(1, keepdim=True)
