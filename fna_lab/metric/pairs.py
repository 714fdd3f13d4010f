"""Which pairs of tokens the nine patterns take away, on a few tokens that can be drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops

# Tokens of T, and of the others, that are drawn.
EACH = 3


def massive_of(members: Tensor) -> Tensor:
    """The massive tokens of classes bool `[b n k]`: bool `[b n]`."""
    return members[..., ops.TOKEN_CLASSES.index("massive")]


def pair_facts(tokens: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """How many tokens T has, and what share of all pairs each pattern takes away.

    Args:
        tokens: T, bool `[b n]`.
        kept: tokens that are no padding, bool `[b n]`: others, and their pairs, do not count.

    Returns:
        Each `[b]`: `tokens_in_T`, and `pairs_<pattern>`.
    """
    facts = {"tokens_in_T": (tokens & kept).sum(1).double()}
    pairs = kept[:, :, None] & kept[:, None]
    for pattern in ops.PATTERNS:
        removed = (ops.removed_pairs(tokens, pattern) & pairs).flatten(1).sum(1)
        facts[f"pairs_{pattern}"] = removed.double() / pairs.flatten(1).sum(1)
    return facts


def drawn_tokens(tokens: Tensor, kept: Tensor, prefix: int, has_cls: bool) -> Tensor:
    """CLS, a few tokens of T and a few others of one picture, evenly spread: long `[s]`.

    Args:
        tokens: T, bool `[n]`.
        kept: tokens that are no padding, bool `[n]`.
        prefix: tokens before the patch tokens.
        has_cls: whether token 0 is CLS.
    """
    patches = torch.arange(len(tokens), device=tokens.device) >= prefix
    parts = [tokens & patches & kept, ~tokens & patches & kept]
    chosen = [tokens.new_zeros(int(has_cls), dtype=torch.long)]
    for part in parts:
        places = part.nonzero()[:, 0]
        count = min(EACH, len(places))
        # In the middle of as many equal stretches: no two meet, and none clings to an edge.
        steps = (2 * torch.arange(count, device=tokens.device) + 1) * len(places)
        chosen.append(places[steps // max(2 * count, 1)])
    return torch.cat(chosen)


def drawn_patterns(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The nine patterns on these tokens of one picture, bool `[9 s s]` (query, key).

    Args:
        tokens: T, bool `[n]`.
        chosen: tokens that are drawn, long `[s]`.
    """
    removed = (ops.removed_pairs(tokens[None], pattern)[0] for pattern in ops.PATTERNS)
    return torch.stack([pairs[chosen][:, chosen] for pairs in removed])
