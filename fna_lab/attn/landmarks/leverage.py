"""Tokens drawn by their ridge leverage."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler, highest
from fna_lab.settings import check_integer, check_number


class LeverageLandmarks(LandmarkSampler):
    """Tokens drawn without replacement, in proportion to their ridge leverage.

    The random numbers depend on the seed and the number of tokens alone, never on the batch.

    Args:
        ridge: relative to the mean eigenvalue of the features' Gram matrix.
        seed: seed of the draw.
    """

    def __init__(self, *, ridge: float = 1e-2, seed: int = 0) -> None:
        check_number("attn.landmarks.ridge", ridge, "a number > 0", above=0)
        check_integer("attn.landmarks.seed", seed, least=None)
        self.ridge = ridge
        self.seed = seed

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
        """Guaranteed tokens, then drawn ones: `[b n c]` -> long `[b m]`."""
        scores = ops.leverage_scores(points, ridge=self.ridge, allowed=allowed)
        uniform = ops.uniform_numbers(points.shape[1], self.seed).to(scores)
        # The largest of log p + Gumbel noise: a draw without replacement.
        order = scores.clamp(min=1e-30).log() - (-uniform.clamp(min=1e-9).log()).log()
        if allowed is not None:
            order = order.masked_fill(~allowed, -torch.inf)
        return highest(order, num, guaranteed)

    def flops(self, tokens: int, channels: int, num: int) -> int:  # noqa: ARG002
        """FLOPs of the scores of one picture."""
        return 3 * tokens * channels**2 + channels**3 // 3
