"""Token merging: similar tokens become one, and are told apart again afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import full_precision
from fna_lab.ops.checks import check_bool, check_float

# Cosines that are held at once, for each picture.
AT_A_TIME = 2**22


def bipartite_matching(
    metric: Tensor,
    num: int,
    *,
    prefix: int = 0,
    keys: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Which tokens to merge: the `num` most similar pairs of even and odd patch tokens.

    Every even token proposes its most similar odd one; the best proposals win, and one odd token
    may win several.

    Args:
        metric: features `[b n c]`, compared by their cosine.
        num: tokens to merge away, at most half of the patch tokens.
        prefix: tokens that are never merged.
        keys: bool `[b n]`; tokens that are not kept merge with one another first, whatever they
            hold, and with kept ones only where there is no other way. None = all are kept.
        real: bool `[b n]`, False = padding, which no real token merges with while there is any
            other: what it holds must change nothing. None = all are.

    Returns:
        The group of each token, long `[b n]`, and the number of groups n - num.

    Raises:
        ValueError: `num` is out of range.

    Source: Bolya et al. 2023 (ToMe).
    """
    check_float("metric", metric, 3, "[b n c]")
    batch, tokens, _ = metric.shape
    most = (tokens - prefix) // 2
    if not 0 <= num <= most:
        raise ValueError(f"Expected num from 0 to {most}, got {num}.")
    place = torch.arange(tokens, device=metric.device)
    even, odd = place[prefix::2], place[prefix + 1 :: 2]
    if num == 0:
        return place.expand(batch, -1), tokens
    if keys is None:
        best, partner = most_similar(metric[:, even], metric[:, odd])
    else:
        check_bool("keys", keys, (batch, tokens))
        kind = (~keys).long()  # how far apart kinds are, not only that they are
        if real is not None:
            check_bool("real", real, (batch, tokens))
            kind = kind.masked_fill(~real, 3)
        mine, theirs = kind[:, even], kind[:, odd]
        best, partner = most_similar(metric[:, even], metric[:, odd], mine, theirs)
        twins = (mine == theirs.gather(1, partner)) & (mine > 0)
        best = best.masked_fill(twins, 2.0)
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, :num]
    source, target = even[chosen], odd[partner.gather(1, chosen)]
    owner = place.expand(batch, -1).scatter(1, source, target)
    whole = torch.ones_like(owner, dtype=torch.bool).scatter(1, source, False)
    rank = whole.long().cumsum(1) - 1
    return rank.gather(1, owner), tokens - num


def most_similar(
    x: Tensor, y: Tensor, x_kind: Tensor | None = None, y_kind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar of some tokens to each of others, by the cosine of their features.

    The n m cosines are never there at once, so that memory is linear in n.

    Args:
        x: features of those that ask `[b n c]`.
        y: features of those that answer `[b m c]`.
        x_kind: long `[b n]`; with `y_kind` long `[b m]` tokens of the nearest kind go together,
            whatever they hold: cosines are 3 lower for each step between kinds. None = all may.
        y_kind: see `x_kind`.

    Returns:
        Cosines `[b n]` in at least float32, and which of `y` they are with, long `[b n]`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    best, which = [], []
    with full_precision(x):
        x, y = F.normalize(x.to(wide), dim=-1), F.normalize(y.to(wide), dim=-1)
        # By the number of answers alone: rounding must not depend on the batch.
        step = max(1, AT_A_TIME // max(1, y.shape[1]))
        for begin in range(0, x.shape[1], step):
            part = slice(begin, begin + step)
            score = x[:, part] @ y.mT
            if x_kind is not None and y_kind is not None:
                score = score - 3.0 * (x_kind[:, part, None] - y_kind[:, None]).abs()
            found = score.max(2)
            best.append(found.values)
            which.append(found.indices)
    return torch.cat(best, dim=1), torch.cat(which, dim=1)
