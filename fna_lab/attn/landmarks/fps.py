"""Farthest points: each landmark is the token farthest from those already taken."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler


class FarthestPointLandmarks(LandmarkSampler):
    """Farthest point sampling, the published choice of Fast Nystroem Attention.

    Args:
        sketch: project the features to so many random dimensions first; None keeps them all.
    """

    def __init__(self, *, sketch: int | None = None) -> None:
        self.sketch = sketch

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
        """Guaranteed tokens, then farthest points: `[b n c]` -> long `[b m]`."""
        return ops.farthest_points(
            points, num, first=guaranteed, allowed=allowed, sketch=self.sketch
        )

    def flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of the farthest points of one picture."""
        return ops.farthest_points_flops(tokens, min(channels, self.sketch or channels), num)
