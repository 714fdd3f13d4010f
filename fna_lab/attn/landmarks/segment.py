"""The middle tokens of equal segments of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler


class SegmentLandmarks(LandmarkSampler):
    """Equal segments of the tokens in raster order, the middle token of each."""

    def __call__(
        self,
        points: Tensor,
        num: int,
        *,
        guaranteed: Tensor,
        allowed: Tensor | None,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,  # noqa: ARG002 (the order of the tokens is enough)
    ) -> Tensor:
        """Guaranteed tokens, then centres of segments: `[b n c]` -> long `[b m]`."""
        batch, size, _ = points.shape
        free = points.new_ones((batch, size), dtype=torch.bool) if allowed is None else allowed
        free = free.scatter(1, guaranteed, False)
        free[:, :num_prefix_tokens] &= size - num_prefix_tokens < num  # patches, while there are
        centres = ops.segment_centres(free, num - guaranteed.shape[1])
        return torch.cat([guaranteed, centres], dim=1)
