"""Keys and values averaged over segments: Linformer with fixed means for its projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.layers import Counts
from fna_lab.attn.reduced import SegmentAttention


class LinformerPoolAttention(SegmentAttention):
    """softmax(s Q (P K)') (P V), where P averages equal segments of tokens (Wang et al. 2020).

    Every prefix token is a segment of its own.

    Args:
        num_landmarks: segments, prefix tokens included; one number, or one a block.

    Raises:
        ValueError: `num_landmarks` is neither a positive integer nor such numbers by block.
    """

    def __init__(self, *, num_landmarks: Counts = 64) -> None:
        super().__init__(num_landmarks=num_landmarks)

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
        """Attend to the means of segments."""
        members, num = self.segments(q, keys, context)
        runs = ops.cluster_runs(members, num)
        k_means, sizes = ops.cluster_means(k, members, num, runs=runs)
        v_means, _ = ops.cluster_means(v, members, num, runs=runs)
        mask = None
        if bias is not None:
            mask = bias @ ops.averaging_weights(members, num, bias.dtype)[:, None].mT
        if keys is not None:
            mask = ops.only_keys(sizes > 0, mask)
        return F.scaled_dot_product_attention(
            q, k_means, v_means, attn_mask=mask, scale=context.scale
        )

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, the means included."""
        several = self.counts(layers)
        attention = sum(ops.subset_flops(tokens, heads, head_dim, num) for num in several)
        return attention + layers * 2 * ops.mean_flops(tokens, channels)
