"""Token dropping by attention, undone after each attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, KeyMaskedAttention
from fna_lab.settings import check_integer, check_number

RESTORE = ("nearest", "zero")


class PruneAttention(KeyMaskedAttention):
    """Patch tokens of little attention neither ask nor answer; the grid is whole again afterwards.

    Tokens are ranked at each layer by the attention of CLS, or, where there is none, by what a
    few evenly spread queries pay them (head means). Kept queries attend to kept keys exactly.
    Unlike FastV and its kin, which hand fewer tokens to the layers above, dropped tokens stay:
    each gets the output of its nearest kept patch token (cosine of the head-mean keys), or zero,
    which lets it pass through the attention of that block unchanged.

    Args:
        keep: share of the patch tokens that is kept, above 0 to 1; prefix tokens always are.
        restore: what dropped tokens get: `nearest` or `zero`.
        queries: patch tokens that rank the others where there is no CLS.

    Raises:
        ValueError: a setting is out of range.

    Source: the ranking of Chen et al. 2024 (FastV) and Yang et al. 2025 (VisionZip), with
    restoration in the place of removal.
    """

    counts_padding = True

    def __init__(self, *, keep: float = 0.5, restore: str = "nearest", queries: int = 16) -> None:
        check_number("attn.keep", keep, "a number above 0, up to 1", above=0, most=1)
        if restore not in RESTORE:
            raise ValueError(f"attn.restore={restore!r}: expected one of {', '.join(RESTORE)}.")
        check_integer("attn.queries", queries)
        self.keep = keep
        self.restore = restore
        self.queries = queries

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        *,
        keys: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Rank, attend among the kept, and give every token its part."""
        prefix, size = context.num_prefix_tokens, q.shape[2]
        count = self._kept(size - prefix)
        num = 1 if context.has_cls else self.queries
        rows = [0]
        if not context.has_cls:
            rows = ops.spread_queries(size - prefix, num, grid=context.grid, prefix=prefix)
        rank = ops.drawn_attention(q, k, rows, scale=context.scale, keys=keys).mean(1)
        if keys is not None:
            rank = rank.masked_fill(~keys, -1)
        best = rank[:, prefix:].topk(count, dim=1).indices + prefix
        first = torch.arange(prefix, device=q.device).expand(q.shape[0], -1)
        kept = torch.cat([first, best.sort(1).values], dim=1)
        mask = None
        if bias is not None:
            mask = ops.gather_tokens(bias.expand(*q.shape[:3], size), kept)
            mask = ops.gather_tokens(mask.mT, kept).mT
        alive = None if keys is None else keys.gather(1, kept)
        if alive is not None:
            mask = ops.only_keys(alive, mask)
        few = F.scaled_dot_product_attention(
            *(ops.gather_tokens(t, kept) for t in (q, k, v)), attn_mask=mask, scale=context.scale
        )
        if not count:  # no patch tokens: nobody is dropped
            return few
        index = kept[:, None, :, None].expand_as(few)
        if self.restore == "zero":
            return torch.zeros_like(v).scatter(2, index, few)
        feature = k.to(torch.promote_types(k.dtype, torch.float32)).mean(1)
        theirs = feature.gather(1, kept[:, prefix:, None].expand(-1, -1, feature.shape[2]))
        # A removed token gives its output to nobody, while there are others.
        kinds = ()
        if keys is not None and alive is not None:
            kinds = torch.zeros_like(keys).long(), (~alive[:, prefix:]).long()
        owner = ops.most_similar(feature, theirs, *kinds)[1] + prefix
        place = torch.arange(kept.shape[1], device=q.device).expand_as(kept)
        return ops.gather_tokens(few, owner.scatter(1, kept, place))

    def _kept(self, patches: int) -> int:
        return min(patches, max(1, round(self.keep * patches)))

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture, the ranking by CLS and the restoring included."""
        left = self._kept(tokens)
        nearest = 2 * tokens * left * head_dim if self.restore == "nearest" else 0
        attention = ops.attention_flops(left, heads, head_dim)
        return layers * (attention + nearest + 2 * tokens * channels)
