"""Medoids of clusters of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.settings import check_integer


class KMeansLandmarks(LandmarkSampler):
    """The token nearest to each mean of a k-means that starts from farthest points.

    Args:
        steps: Lloyd steps.
        sketch: project the features to so many random dimensions first; None keeps them all.

    Raises:
        ValueError: `steps` is negative, or `sketch` is not positive.
    """

    def __init__(self, *, steps: int = 3, sketch: int | None = 32) -> None:
        check_integer("attn.landmarks.steps", steps, least=0)
        check_integer("attn.landmarks.sketch", sketch, optional=True)
        self.steps = steps
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
        """Guaranteed tokens, then medoids: `[b n c]` -> long `[b m]`."""
        seeds = ops.farthest_points(
            points, num, first=guaranteed, allowed=allowed, sketch=self.sketch
        )
        free = points.new_ones(points.shape[:2], dtype=torch.bool) if allowed is None else allowed
        medoids = ops.cluster_medoids(points, seeds, allowed=free, steps=self.steps)
        # A guaranteed token stays, and gives way in the cluster that it may be the medoid of.
        known = guaranteed.shape[1]
        rest = medoids[:, known:]
        taken = (rest[:, :, None] == guaranteed[:, None]).any(2)
        return torch.cat([guaranteed, torch.where(taken, seeds[:, known:], rest)], dim=1)

    def flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of the choice for one picture."""
        seeds = ops.farthest_points_flops(tokens, min(channels, self.sketch or channels), num)
        return seeds + (self.steps + 1) * 4 * tokens * channels * num
