"""Farthest points: each landmark is the token farthest from those already taken."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.settings import check_integer


class FarthestPointLandmarks(LandmarkSampler):
    """Farthest point sampling, the published choice of Fast Nystroem Attention.

    Args:
        sketch: project the features to so many random dimensions first; None keeps them all.
        block: take half of the landmarks from a sample, half from what then lies farthest out,
            the latter so many at a time (`ops.spread_points` with `thin`): much faster with
            torch's operators, at nearly the same coverage. 32 is a good number for 64 landmarks
            and more; fewer at a time cover points better that vary smoothly. None = one by one
            from all tokens, exactly, which compiled kernels do in the same time, and always.

    Raises:
        ValueError: `sketch` or `block` is not positive.
    """

    def __init__(self, *, sketch: int | None = None, block: int | None = None) -> None:
        check_integer("attn.landmarks.sketch", sketch, optional=True)
        check_integer("attn.landmarks.block", block, optional=True)
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
        grid: tuple[int, int] | None,  # noqa: ARG002 (any token may be taken)
    ) -> Tensor:
        """Guaranteed tokens, then farthest points: `[b n c]` -> long `[b m]`.

        With no token guaranteed, the first patch token begins: CLS is left to its distance.
        """
        if guaranteed.shape[1] == 0:
            place = torch.arange(points.shape[1], device=points.device)
            begin = (place >= min(num_prefix_tokens, points.shape[1] - 1)).expand(len(points), -1)
            begin = begin if allowed is None else begin & allowed
            guaranteed = begin.int().argmax(1, keepdim=True)
        if self.block is None:
            return ops.farthest_points(
                points, num, first=guaranteed, allowed=allowed, sketch=self.sketch
            )
        return ops.spread_points(
            points,
            num,
            first=guaranteed,
            allowed=allowed,
            barred=self.barred,
            sketch=self.sketch,
            block=self.block,
            candidates=_candidates(self.block, points.shape[1]),
            thin=True,
        )

    def flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of the farthest points of one picture."""
        if self.block is not None:
            thin = _candidates(self.block, tokens), -(-num // (2 * self.block))
            return ops.spread_points_flops(tokens, channels, num, self.sketch, thin)
        return ops.farthest_points_flops(tokens, min(channels, self.sketch or channels), num)


def _candidates(block: int, tokens: int) -> int:
    """Candidates of a round: of more tokens more lie far out side by side."""
    return max(64, 5 * block, min(tokens // 24, 512))
