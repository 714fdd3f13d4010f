"""The token nearest to each axis of a multiclass spectral clustering."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.settings import check_integer


class NcutLandmarks(LandmarkSampler):
    """As many eigenvectors of a normalised cut as landmarks, turned so that groups are axes.

    Each axis takes the token of the largest value along it that no axis before took. A choice for
    analysis: its eigenvectors cost more than the attention that they would save.

    Args:
        samples: most tokens that stand for all others in the cut, at least as many as landmarks;
            None = exact.
        steps: turns of the axes.

    Raises:
        ValueError: a setting is out of range.

    Source: Yu and Shi 2003; `multiclass_spectral_clustering` of Fast Nystroem Attention.
    """

    def __init__(self, *, samples: int | None = 256, steps: int = 30) -> None:
        check_integer("attn.landmarks.samples", samples, optional=True)
        check_integer("attn.landmarks.steps", steps, least=0)
        self.samples = samples
        self.steps = steps

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
        """Guaranteed tokens, then one an axis: `[b n c]` -> long `[b m]`."""
        axes = num - guaranteed.shape[1]
        if axes == 0:
            return guaranteed
        free = points.new_ones(points.shape[:2], dtype=torch.bool) if allowed is None else allowed
        samples = None if self.samples is None else max(self.samples, axes)
        cut = ops.normalized_cut(points, axes, samples=samples, allowed=free)
        values = ops.align_axes(cut.vectors, allowed=free, steps=self.steps)
        # Cosines are above -2, which stands for what was taken: again only where nothing is left.
        values = values.masked_fill(~free[..., None], -3.0)
        values = values.scatter(1, guaranteed[..., None].expand(-1, -1, axes), -2.0)
        picks = [guaranteed]
        for axis in range(axes):
            pick = values[..., axis].argmax(1, keepdim=True)
            values.scatter_(1, pick[..., None].expand(-1, -1, axes), -2.0)
            picks.append(pick)
        return torch.cat(picks, dim=1)

    def flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of the choice for one picture, an eigenvalue problem of m taken as 10 m^3."""
        samples = tokens if self.samples is None else min(tokens, max(self.samples, num))
        pairs = 2 * tokens * samples * channels
        solve = 10 * samples**3 if samples == tokens else 20 * samples**3 + 6 * tokens * samples**2
        return pairs + solve + 2 * self.steps * tokens * num**2
