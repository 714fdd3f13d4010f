"""Farthest points of the picture, and apart from them of the text behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.settings import check_integer


class JointLandmarks(LandmarkSampler):
    """So many landmarks among the text tokens of a joint block, the others in the picture.

    Taken together, farthest points would settle the shares by how far the two kinds of tokens lie
    apart. A host without a text behind the picture has all of them in the picture.

    Args:
        text: landmarks among the text tokens; all of those where there are fewer.
        sketch: project the features to so many random dimensions first; None keeps them all.
        block: take so many at a time (`ops.spread_points`).

    Raises:
        ValueError: `text` is negative, or `sketch` or `block` is not positive.
    """

    def __init__(self, *, text: int = 256, sketch: int | None = 64, block: int = 32) -> None:
        check_integer("attn.landmarks.text", text, least=0)
        check_integer("attn.landmarks.block", block)
        check_integer("attn.landmarks.sketch", sketch, optional=True)
        self.text = text
        self.sketch = sketch
        self.block = block

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
        """Guaranteed tokens, the picture's, then the text's: `[b n c]` -> long `[b m]`."""
        size = points.shape[1]
        picture = size if grid is None else num_prefix_tokens + grid[0] * grid[1]
        words = min(self.text, size - picture, num - 1)
        words = max(words, num - picture)  # where the picture has too few tokens
        picks = self._spread(points, num - words, slice(0, picture), guaranteed, allowed)
        if words == 0:
            return picks
        rest = self._spread(points, words, slice(picture, size), None, allowed)
        return torch.cat([picks, rest + picture], dim=1)

    def _spread(
        self, points: Tensor, num: int, part: slice, first: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        """Farthest points of a part of the tokens, counted from its begin: long `[b num]`."""
        return ops.spread_points(
            points[:, part],
            num,
            first=None if first is None or first.shape[1] == 0 else first,
            allowed=None if allowed is None else allowed[:, part],
            barred=self.barred,
            sketch=self.sketch,
            block=self.block,
            candidates=max(128, self.block),
        )

    def flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of the farthest points of one picture, as if all were taken together."""
        return ops.spread_points_flops(tokens, channels, num, self.sketch)
