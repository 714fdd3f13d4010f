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
        free = points.new_ones(points.shape[:2], dtype=torch.bool) if allowed is None else allowed
        free = free.scatter(1, guaranteed, False)
        wanted = num - guaranteed.shape[1]
        patches = free[:, num_prefix_tokens:].sum(1, keepdim=True)
        free[:, :num_prefix_tokens] &= patches < wanted  # patches, while there are enough
        centres = ops.segment_centres(free, wanted)
        return torch.cat([guaranteed, centres], dim=1)
