"""Which (query, key) pairs of a token set T are taken away, and attention without them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import attention_logits, attention_with_lse
from fna_lab.ops.checks import check_bool, check_choice, check_qkv, default_scale
from fna_lab.ops.nystrom import gather_tokens, put_tokens

PATTERNS = (
    "type1",
    "type2",
    "t_to_x",
    "t_to_t",
    "others_to_t",
    "t_self",
    "t_to_others",
    "x_self",
    "x_to_x",
)
STAGES = ("mask", "sink")
EMPTY_ROWS = ("t_to_x", "x_to_x")
WITHOUT_TOKENS = ("x_self", "x_to_x")  # the same pairs whatever is in T


def check_pattern(pattern: str, stage: str, prefix: str = "") -> str:
    """The pattern itself, where it exists and leaves every row a key by construction.

    Args:
        pattern: a name of `PATTERNS`.
        stage: a name of `STAGES`.
        prefix: of the settings' names in messages.

    Raises:
        ValueError: a name is unknown, or a `mask` would empty whole rows (`t_to_x`, `x_to_x`).
    """
    check_choice(f"{prefix}pattern", pattern, PATTERNS)
    check_choice(f"{prefix}stage", stage, STAGES)
    if stage == "mask" and pattern in EMPTY_ROWS:
        raise ValueError(
            f"Expected {prefix}stage 'sink' with {prefix}pattern {pattern!r}, got 'mask', which "
            "leaves whole rows without a key."
        )
    return pattern


def removed_pairs(tokens: Tensor, pattern: str, queries: slice = slice(None)) -> Tensor:
    """Which pairs a pattern takes away.

    `type1`: every row x T. `type2`: the same, but each token of T still sees itself. `t_to_x`:
    rows of T. `t_to_t`: T x T. `others_to_t`: rows outside T x T. `t_self`: T's own diagonal.
    `t_to_others`: rows of T but their own diagonal. `x_self`: the whole diagonal. `x_to_x`: all.

    Args:
        tokens: T, bool `[b n]`.
        pattern: one of `PATTERNS`.
        queries: those that are wanted.

    Returns:
        bool `[b n n]` (query, key), or `[b m n]` for m queries, True = taken away.

    Raises:
        TypeError: `tokens` is not boolean.
        ValueError: the pattern is unknown or `tokens` is not `[b n]`.
    """
    _check_tokens(tokens)
    check_choice("pattern", pattern, PATTERNS)
    rows, columns = tokens[:, queries, None], tokens[:, None, :]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    own = (place[queries, None] == place)[None]
    everything = torch.ones_like(own)
    return {
        "type1": lambda: columns & everything,
        "type2": lambda: columns & ~own,
        "t_to_x": lambda: rows & everything,
        "t_to_t": lambda: rows & columns,
        "others_to_t": lambda: ~rows & columns,
        "t_self": lambda: rows & own,
        "t_to_others": lambda: rows & ~own,
        "x_self": lambda: own.expand(tokens.shape[0], -1, -1),
        "x_to_x": lambda: everything.expand(tokens.shape[0], -1, -1),
    }[pattern]()


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    *,
    pattern: str,
    stage: str,
    scale: float | None = None,
    bias: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Exact attention without the pairs of a pattern.

    `type1` and `type2` keep the fused kernel (see `restore_own_rows`); the other patterns, which
    are for analysis, write the attention matrix out.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        tokens: T, bool `[b n]`, shared by the heads.
        pattern: one of `PATTERNS`.
        stage: `mask` = logits -inf before softmax, so that the other weights of a row grow;
            `sink` = weights zero after softmax, so that their mass is lost.
        scale: factor of the logits; None = d^-1/2.
        bias: added to the logits, float, broadcastable to `[b h n n]`; None = nothing.
        rows: `token_rows(tokens)`, where it is at hand already.

    Returns:
        `[b h n d]`. A row of which a `mask` leaves no key gives zeros.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a name is unknown, or the pattern empties whole rows by
            construction (`t_to_x`, `x_to_x` with stage `mask`).
    """
    check_qkv(q, k, v)
    check_bool("tokens", tokens, (q.shape[0], k.shape[2]))
    check_pattern(pattern, stage)
    scale = default_scale(q) if scale is None else scale
    if pattern not in ("type1", "type2"):
        return _dense(q, k, v, removed_pairs(tokens, pattern), stage, scale, bias)
    own = pattern == "type2"
    if stage == "sink":
        keys, kept = None, zero_rows(v, tokens, rows)
        out, lse = _attend(q, k, kept, bias, scale, own)
    else:
        keys = ~tokens
        out, lse = _without_keys(q, k, v, keys, scale, bias, rows, own)
    if not own:
        return out
    index, valid = token_rows(tokens) if rows is None else rows
    more: dict[str, Any] = {"stage": stage, "scale": scale, "keys": keys, "bias": bias}
    return restore_own_rows(out, q, k, v, index, valid, lse=lse, **more)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Fused attention, with its `attention_with_lse` where that is of use and at hand."""
    if lse:
        return attention_with_lse(q, k, v, scale=scale, mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None


def token_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of T, padded to the largest set of the batch.

    The one place that copies a number to the host: do it once a forward pass.

    Args:
        tokens: T, bool `[b n]`.

    Returns:
        Indices long `[b t]`, and bool `[b t]`, False where an index is padding.

    Raises:
        TypeError: `tokens` is not boolean.
        ValueError: `tokens` is not `[b n]`.
    """
    _check_tokens(tokens)
    counts = tokens.sum(1)
    if torch.compiler.is_compiling():
        # One more row, of padding, so that the traced graph need not ask whether there is any.
        largest = int((counts.max() + 1).clamp(max=tokens.shape[1]))
        torch._check(largest >= 1)
        torch._check(largest <= tokens.shape[1])
    else:
        largest = int(counts.max()) if tokens.shape[0] else 0
    # Stable: the tokens of T in ascending order first, then padding.
    order = (~tokens).int().sort(dim=1, stable=True).indices[:, :largest]
    return order, tokens.gather(1, order)


def zero_rows(x: Tensor, tokens: Tensor, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A copy of `[b h n d]` in which the tokens of T, bool `[b n]`, are zero.

    `rows` is `token_rows(tokens)`: with it only those rows are touched again after the copy.
    """
    if rows is None:
        return x.masked_fill(tokens[:, None, :, None], 0)
    index, valid = rows
    index = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    fill = x.gather(2, index).masked_fill(valid[:, None, :, None], 0)
    return x.clone().scatter_(2, index, fill)


def _without_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    scale: float,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention to kept keys, bool `[b n]`, alone; zeros where none is kept. See `_attend`."""
    # Under `torch.compile` the largest number of removed tokens is not known.
    known = rows is not None and not torch.compiler.is_compiling()
    few = known and rows is not None and rows[0].shape[1] < k.shape[2]
    if rows is not None and few and len(keys) == 1 and bias is None:
        # One picture: the kept keys are so many, and without a mask the kernel is faster.
        kept = (~keys[0]).int().argsort(stable=True)[: k.shape[2] - rows[0].shape[1]]
        k, v = gather_tokens(k, kept[None]), gather_tokens(v, kept[None])
        return _attend(q, k, v, None, scale, lse)
    keep = keys[:, None, None]
    mask = keep if bias is None else bias.masked_fill(~keep, -torch.inf)
    # Rows without a key have no sum: then nobody asks for it.
    out, total = _attend(q, k, v, mask, scale, lse and few and bias is None)
    if few:
        return out, total
    return out.masked_fill(~keys.any(1)[:, None, None, None], 0), None


def restore_own_rows(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    valid: Tensor,
    *,
    stage: str,
    scale: float,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Turn `type1` attention into `type2`: let each token of T see itself again.

    Stage `mask` gives the few rows of T their exact output over the kept keys and themselves;
    stage `sink` adds to them their own diagonal weight times their own value. O(|T| n d), or
    O(|T| d) where `lse` is known.

    Args:
        out: attention under `type1` `[b h n d]`, exact or approximated. Written over where no
            gradient is asked for.
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`, none of them set to zero.
        rows: indices of T, long `[b t]`.
        valid: bool `[b t]`, False where `rows` is padding.
        stage: `mask` or `sink`.
        scale: factor of the logits.
        keys: kept keys, bool `[b n]`; None = all.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing.
        lse: logsumexp of the logits `[b h n]` that `out`, which is exact then, was divided by:
            over the kept keys in stage `mask`, over all in stage `sink`. None = unknown.

    Returns:
        `[b h n d]`.

    Raises:
        ValueError: the stage is unknown.
    """
    check_choice("stage", stage, STAGES)
    # Under `torch.compile` the number of rows is not known.
    if not torch.compiler.is_compiling() and rows.shape[1] == 0:
        return out
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    own_q, own_v, now = q.gather(2, index), v.gather(2, index), out.gather(2, index)
    across = rows[:, None, :, None].expand(-1, q.shape[1], -1, -1)  # [b h t 1]
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        bias = bias.gather(2, across.expand(-1, -1, -1, k.shape[2]))
    wide = torch.promote_types(q.dtype, torch.float32)
    if lse is not None:
        own = scale * (own_q.to(wide) * k.gather(2, index).to(wide)).sum(-1, keepdim=True)
        own = own if bias is None else own + bias.gather(3, across)
        others = lse[..., None].gather(2, across)
        if stage == "mask":
            shares = torch.cat([own, others], dim=-1).softmax(-1)
            exact = now * shares[..., 1:] + own_v * shares[..., :1]
        else:
            exact = now + own_v * (own - others).exp()
    elif stage == "mask":
        mask = bias
        if keys is not None:
            kept = keys[:, None, None].expand(-1, 1, rows.shape[1], -1)
            kept = kept.scatter(3, rows[:, None, :, None], True)  # themselves
            mask = kept if bias is None else bias.masked_fill(~kept, -torch.inf)
        exact = F.scaled_dot_product_attention(own_q, k, v, attn_mask=mask, scale=scale)
    else:
        logits = attention_logits(own_q, k, scale)
        logits = logits if bias is None else logits + bias
        own = logits.gather(3, across)
        if keys is not None:
            logits = logits.masked_fill(~keys[:, None, None], -torch.inf)
        weight = (own - logits.logsumexp(-1, keepdim=True)).exp().to(v.dtype)
        exact = now + weight * own_v
    # Autocast gives the fused kernel's output a dtype of its own.
    exact = torch.where(valid[:, None, :, None], exact.to(out.dtype), now)
    return put_tokens(out, rows, exact)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    removed: Tensor,
    stage: str,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    logits = attention_logits(q, k, scale)
    if bias is not None:
        logits = logits + bias
    removed = removed[:, None]
    if stage == "mask":
        weights = logits.masked_fill(removed, -torch.inf).softmax(-1)
        weights = weights.masked_fill(removed.all(-1, keepdim=True), 0)
    else:
        weights = logits.softmax(-1).masked_fill(removed, 0)
    return weights.to(v.dtype) @ v


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.bool:
        came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"Expected tokens to be a bool tensor [b n], got {came}.")
    if tokens.ndim != 2:
        raise ValueError(f"Expected tokens to have shape [b n], got {tuple(tokens.shape)}.")
