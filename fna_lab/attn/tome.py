"""Token merging around attention, undone after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, KeyMaskedAttention
from fna_lab.settings import check_number


class TomeAttention(KeyMaskedAttention):
    """Similar patch tokens attend, and are attended to, as one; every token then gets its part.

    Bipartite matching on the head mean of the keys, and attention in proportion to the number of
    tokens in a group (Bolya et al. 2023, ToMe). Unlike the original, which hands fewer tokens to
    the layers above, the grid is whole again after each attention, so that layer scale, position
    encodings and dense outputs of the host stay what they are.

    Args:
        ratio: share of the patch tokens that is merged away, 0 to 0.5.

    Raises:
        ValueError: `ratio` is out of range.
    """

    counts_padding = True

    def __init__(self, *, ratio: float = 0.5) -> None:
        check_number("attn.ratio", ratio, "a number from 0 to 0.5", least=0, most=0.5)
        self.ratio = ratio

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
        """Merge, attend, and give every token what its group has."""
        prefix = context.num_prefix_tokens
        num = int(self.ratio * (q.shape[2] - prefix))
        real = None if keys is None else context.kept
        group, groups = ops.bipartite_matching(k.mean(1), num, prefix=prefix, keys=keys, real=real)
        kept = asks = group if keys is None else group.masked_fill(~keys, -1)
        runs = asking = ops.cluster_runs(kept, groups)
        means, size = ops.cluster_means(k, kept, groups, runs=runs)
        values, _ = ops.cluster_means(v, kept, groups, runs=runs)
        if keys is not None:
            asks = self._asking(group, groups, keys, real)
            asking = ops.cluster_runs(asks, groups)
        queries, _ = ops.cluster_means(q, asks, groups, runs=asking)
        mask = size.log()[:, None, None]
        if bias is not None:
            rows = bias.expand(q.shape[0], q.shape[1], -1, -1)
            rows, _ = ops.cluster_means(rows, asks, groups, runs=asking)
            columns, _ = ops.cluster_means(rows.mT, kept, groups, runs=runs)
            mask = mask + columns.mT
        out = F.scaled_dot_product_attention(
            queries, means, values, attn_mask=mask.to(q.dtype), scale=context.scale
        )
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # whole tokens lie together
        return ops.gather_tokens(out, group)

    @staticmethod
    def _asking(group: Tensor, groups: int, keys: Tensor, real: Tensor | None) -> Tensor:
        """Groups of the tokens whose mean asks, long `[b n]`, -1 = not among them.

        A removed token weighs nothing beside a kept one, padding nothing beside a real token; a
        group of removed ones alone still asks, and so does one of padding.
        """
        asks = keys
        for more in (keys if real is None else real, torch.ones_like(keys)):
            count = torch.zeros((len(group), groups), dtype=torch.long, device=group.device)
            count = count.scatter_add(1, group, asks.to(count.dtype))
            asks = asks | more & (count.gather(1, group) == 0)
        return group.masked_fill(~asks, -1)

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, the matching included."""
        del channels
        left = tokens - int(self.ratio * tokens)
        matching = tokens * tokens // 2 * head_dim
        return layers * (ops.attention_flops(left, heads, head_dim) + matching)
