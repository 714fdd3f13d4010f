"""Token merging: similar tokens become one, and are told apart again afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float


def bipartite_matching(
    metric: Tensor, num: int, *, prefix: int = 0, keys: Tensor | None = None
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
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    score = unit[:, even] @ unit[:, odd].mT  # [b n/2 n/2]
    if keys is not None:
        check_bool("keys", keys, (batch, tokens))
        mine, theirs = keys[:, even, None], keys[:, None, odd]
        score = score.masked_fill(mine != theirs, -2.0).masked_fill(~(mine | theirs), 2.0)
    best, partner = score.max(2)
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, :num]
    source, target = even[chosen], odd[partner.gather(1, chosen)]
    owner = place.expand(batch, -1).scatter(1, source, target)
    whole = torch.ones_like(owner, dtype=torch.bool).scatter(1, source, False)
    rank = whole.long().cumsum(1) - 1
    return rank.gather(1, owner), tokens - num
