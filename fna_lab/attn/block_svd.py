"""Low-rank attention, block by block of token classes: analysis only, O(n^3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, KeyMaskedAttention
from fna_lab.attn.classes import DETECTED, read_classes, token_set
from fna_lab.settings import check_integer


class BlockSvdAttention(KeyMaskedAttention):
    """Every (class, class) block of the exact attention, per head, cut to a few singular values.

    It tells how much of attention is low rank once special tokens are set apart. It saves
    nothing: the n x n pattern is made, and every block of it decomposed.

    Args:
        rank: singular values of each block.
        partition: token classes that are classes of their own, the other tokens being one more:
            cls, register, massive, artifact; empty = one block.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, *, rank: int = 4, partition: Sequence[str] = ("cls",)) -> None:
        check_integer("attn.rank", rank)
        self.rank = rank
        self.partition = read_classes("attn.partition", partition)
        self.token_classes = tuple(c for c in DETECTED if c in self.partition)

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
        """See `ops.block_low_rank`."""
        batch, _, size, _ = q.shape
        logits = ops.attention_logits(q, k, context.scale)
        if bias is not None:
            logits = logits + bias
        if keys is not None:
            logits = logits.masked_fill(~keys[:, None, None], torch.finfo(logits.dtype).min)
        labels = torch.zeros((batch, size), dtype=torch.long, device=q.device)
        num = 1
        for name in self.partition:
            labels = labels.masked_fill(token_set([name], batch, size, context), num)
            num += 1
        if keys is not None:  # what is not kept must not bend the blocks of what is
            labels = labels.masked_fill(~keys, num)
            num += 1
        if context.kept is not None:  # nor padding the rows of tokens that were taken away
            labels = labels.masked_fill(~context.kept, num)
            num += 1
        with ops.full_precision(q):
            pattern = ops.block_low_rank(logits.softmax(-1), labels, num, self.rank)
            return (pattern @ v.to(pattern.dtype)).to(v.dtype)

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of one picture: exact attention, and about 20 n^3 a decomposition."""
        del channels
        blocks = (len(self.partition) + 1) ** 2
        exact = ops.attention_flops(tokens, heads, head_dim)
        return layers * (exact + 20 * heads * blocks * tokens**3)
