"""The tokens that draw most attention, by a cheap estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler, highest
from fna_lab.settings import check_integer


class AttentionLandmarks(LandmarkSampler):
    """The tokens that CLS and a small grid of queries attend to most.

    Args:
        queries: patch tokens, evenly spread, whose attention is looked at beside that of CLS; half
            of the estimate is CLS's, where there is one.

    Raises:
        ValueError: `queries` is no positive integer.
    """

    reads = "attention"

    def __init__(self, *, queries: int = 16) -> None:
        check_integer("attn.landmarks.queries", queries)
        self.queries = queries

    def drawn(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        allowed: Tensor | None,
        has_cls: bool,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        """See `ops.drawn_attention`: `[b h n]`."""
        size = q.shape[2] - num_prefix_tokens
        rows = ops.spread_queries(
            size, self.queries, grid=grid, prefix=num_prefix_tokens, has_cls=has_cls
        )
        return ops.drawn_attention(q, k, rows, scale=scale, keys=allowed, first_half=has_cls)

    def __call__(
        self,
        points: Tensor,
        num: int,
        *,
        guaranteed: Tensor,
        allowed: Tensor | None,
        num_prefix_tokens: int,  # noqa: ARG002 (any token may be taken)
        grid: tuple[int, int] | None,  # noqa: ARG002
    ) -> Tensor:
        """Guaranteed tokens, then those that draw most: `[b n 1]` -> long `[b m]`."""
        drawn = points.to(torch.promote_types(points.dtype, torch.float32)).sum(2)
        if allowed is not None:
            drawn = drawn.masked_fill(~allowed, -torch.inf)
        return highest(drawn, num, guaranteed)

    def flops(self, tokens: int, channels: int, num: int) -> int:  # noqa: ARG002
        """FLOPs of the estimate for one picture: a few rows of attention logits."""
        return 2 * tokens * channels * (self.queries + 1)
