"""Where the attention of a block goes: by token, by head, by class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, Removal

# Entries of the attention matrix that are written out at once: 64 MiB in float32.
PIECE = 2**24
ALL = slice(None)


def attention_pattern(
    q: Tensor, k: Tensor, context: Context, *, pictures: slice = ALL, rows: slice = ALL
) -> Tensor:
    """The exact attention of a block under the host's bias and the mask strategy.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        context: of the block.
        pictures: those of the batch that are wanted.
        rows: the queries that are wanted.

    Returns:
        `[b h m n]` in at least float32; rows sum to 1, or less after a `sink` stage.
    """
    bias, removal = context.attn_mask, context.removal
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])[pictures, :, rows]
    q, k, scale = q[pictures, :, rows], k[pictures], context.scale
    if removal is None:
        return ops.attention_pattern(q, k, scale=scale, bias=bias)
    gone = ops.removed_pairs(removal.tokens[pictures], removal.pattern, rows)[:, None]
    if removal.stage == "sink":
        return ops.attention_pattern(q, k, scale=scale, bias=bias).masked_fill(gone, 0.0)
    if bias is None or bias.dtype == torch.bool:
        bias = ~gone if bias is None else bias & ~gone
    else:
        bias = bias.masked_fill(gone, -torch.inf)
    # A row of which nothing is left attends to nothing.
    return ops.attention_pattern(q, k, scale=scale, bias=bias).nan_to_num(0.0)


@dataclass(frozen=True)
class Sums:
    """The attention of a block, summed up.

    Attributes:
        incoming: attention that each token draws, mean over the queries that are no padding
            `[b h n]`.
        first: attention of token 0, which is CLS where there is one `[b h n]`.
        mass: sum over the pairs of each two classes (query, key) `[b h k k]`.
        pushed: the same of attention times the suppression matrix, None where not asked for.
    """

    incoming: Tensor
    first: Tensor
    mass: Tensor
    pushed: Tensor | None


def attention_sums(
    q: Tensor,
    k: Tensor,
    context: Context,
    members: Tensor,
    *,
    seen: Tensor | None = None,
    v: Tensor | None = None,
    piece: int = PIECE,
) -> Sums:
    """Sum up the attention of a block without ever writing all of it out.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        context: of the block.
        members: classes of the tokens, bool `[b n k]`; padding is in none.
        seen: directions of the tokens as the values see them `[b h n d]`, see `directions`.
        v: values `[b h n d]`; with `seen` they give the suppression matrix, row by row.
        piece: most entries of the attention matrix at once.

    Returns:
        The sums; each picture's depend on itself alone.
    """
    batch, heads, n, _ = q.shape
    kept = context.kept
    together = max(1, piece // (heads * n * n))
    rows = max(1, min(n, piece // (heads * n)))
    found: list[Sums] = []
    for b in range(0, batch, together):
        pictures = slice(b, b + together)
        keys, real = members[pictures], None if kept is None else kept[pictures]
        incoming, mass, pushed = 0.0, 0.0, 0.0
        first = None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            weights = attention_pattern(q, k, context, pictures=pictures, rows=part)
            weights = ops.without_padding_rows(weights, real, part)
            first = weights[:, :, 0] if first is None else first
            incoming = incoming + weights.sum(2)
            mass = mass + ops.class_sums(weights, keys[:, part], keys)
            if seen is not None and v is not None:
                push = seen[pictures, :, part].to(weights) @ v[pictures].to(weights).mT
                pushed = pushed + ops.class_sums(weights * push, keys[:, part], keys)
        assert first is not None and isinstance(mass, Tensor) and isinstance(incoming, Tensor)
        count = n if real is None else real.sum(1)[:, None, None]
        found.append(
            Sums(incoming / count, first, mass, pushed if isinstance(pushed, Tensor) else None)
        )
    pushes = [part.pushed for part in found if part.pushed is not None]
    return Sums(
        torch.cat([part.incoming for part in found]),
        torch.cat([part.first for part in found]),
        torch.cat([part.mass for part in found]),
        torch.cat(pushes) if pushes else None,
    )


def first_pictures(context: Context, num: int) -> Context:
    """The context of the first pictures of a batch alone."""
    bias, removal = context.attn_mask, context.removal
    if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias[:num]
    if removal is not None:
        removal = Removal(
            removal.tokens[:num],
            removal.pattern,
            removal.stage,
            removal.rows[:num],
            removal.valid[:num],
        )
    return replace(context, x=context.x[:num], attn_mask=bias, removal=removal)


def mass_facts(sums: Sums, members: Tensor) -> dict[str, Tensor]:
    """Attention mass by class, heads averaged.

    Args:
        sums: of the block.
        members: bool `[b n k]`.

    Returns:
        `mass/<class>` `[b]`: share of all attention that goes to the class, NaN where a picture
        has none of it. `mass` `[b k]`: the same with 0 there. `flow` `[b k k]`: by class of the
        query, NaN where there is none of that.
    """
    total = sums.mass.mean(1)
    count = members.sum(1).to(total.dtype)
    share = total.sum(1) / _tokens(members)
    flow = torch.where(count[..., None] > 0, total / count[..., None], torch.nan)
    facts = by_class("mass", share.where(count > 0, torch.nan))
    return facts | {"mass": share, "flow": flow}


def incoming_facts(sums: Sums, members: Tensor) -> dict[str, Tensor]:
    """`incoming/<class>` `[b]`: attention that a token of the class draws, in uniform shares."""
    drawn = sums.incoming.mean(1)
    return by_class("incoming", ops.class_mean(drawn * _tokens(members), members))


def sink_facts(
    sums: Sums, *, num_prefix_tokens: int, has_cls: bool, epsilon: float
) -> dict[str, Tensor]:
    """Which heads have a sink: a token that draws more than `epsilon` of the head's attention.

    Args:
        sums: of the block.
        num_prefix_tokens: CLS and registers before the patch tokens.
        has_cls: whether token 0 is CLS.
        epsilon: that share.

    Returns:
        `sink_rate/<cls, register, patch>` `[b]`: share of the heads that have such a sink;
        `sink_heads` `[b h 3]`: which ones; `sink_shares` `[b h 3]`: the largest share. NaN where
        there is no such token.

    Source: Gu et al. 2025, When Attention Sink Emerges (sink rate), without the causal factor.
    """
    drawn = sums.incoming
    first = int(has_cls)
    parts = {"cls": drawn[..., :first], "register": drawn[..., first:num_prefix_tokens],
             "patch": drawn[..., num_prefix_tokens:]}  # fmt: skip
    shares = []
    facts: dict[str, Tensor] = {}
    for name, part in parts.items():
        none = torch.full_like(drawn[..., 0], torch.nan)
        shares.append(part.amax(-1) if part.shape[-1] else none)
        if part.shape[-1]:
            facts[f"sink_rate/{name}"] = (shares[-1] > epsilon).to(drawn.dtype).mean(1)
    share = torch.stack(shares, dim=-1)
    heads = (share > epsilon).to(share.dtype).where(~share.isnan(), torch.nan)
    return facts | {"sink_heads": heads, "sink_shares": share}


def _tokens(members: Tensor) -> Tensor:
    """How many tokens of each picture are in a class at all, long `[b 1]`: padding is in none."""
    return members.any(-1).sum(1, keepdim=True)


def by_class(group: str, values: Tensor) -> dict[str, Tensor]:
    """`[b k]` as one `[b]` a class, named `<group>/<class>`."""
    return {f"{group}/{name}": values[:, i] for i, name in enumerate(ops.TOKEN_CLASSES)}
