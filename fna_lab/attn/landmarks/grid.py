"""A regular grid over the picture, whatever it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler


class GridLandmarks(LandmarkSampler):
    """A regular 2-D grid, filled up with the places farthest from it."""

    def __call__(
        self,
        points: Tensor,
        num: int,
        *,
        guaranteed: Tensor,
        allowed: Tensor | None,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        """Guaranteed tokens, then the grid: `[b n c]` -> long `[b m]`.

        Raises:
            ValueError: the host's patch grid is unknown.
        """
        first = self.with_cells(
            guaranteed,
            num - guaranteed.shape[1],
            num_prefix_tokens=num_prefix_tokens,
            grid=grid,
            instead="segment",
        )
        assert grid is not None  # or the line above raised
        batch, size, _ = points.shape
        patches = torch.arange(grid[0] * grid[1], device=points.device)
        places = torch.stack([patches // grid[1], patches % grid[1]], dim=1).to(torch.float32)
        # Prefix tokens have no place; they come last, as if they lay on the first patch. So does
        # a text behind the picture.
        behind = size - num_prefix_tokens - len(places)
        before = places[:1].expand(num_prefix_tokens, -1)
        places = torch.cat([before, places, places[:1].expand(behind, -1)])
        return ops.farthest_points(places.expand(batch, -1, -1), num, first=first, allowed=allowed)
