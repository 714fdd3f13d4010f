"""Massive tokens: far along the first principal direction of their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive


class ProjectionDetector(Detector):
    """Patch tokens that project beyond a multiple of the picture's typical length.

    The published form takes one direction for a whole batch and absolute thresholds, which hold
    for CLIP ViT-L/14 alone: 25.0 for massive tokens after block 12, 0.015 of a normalised-cut
    eigenvector for artifacts after block 15. Here the mean of the picture's patch tokens is taken
    off, the direction is the picture's own or a given one, and the threshold is relative.

    Args:
        ratio: threshold, in median lengths of the picture's demeaned patch tokens.
        direction: one number a channel, or a `.npy` file of them; tokens against it are not
            found. None = each picture's own first principal direction.

    Raises:
        ValueError: a setting is out of range, or the file holds no vector.
    """

    def __init__(
        self, *, ratio: float = 3.0, direction: str | Sequence[float] | None = None
    ) -> None:
        check_positive("ratio", ratio)
        self.ratio = ratio
        self.direction = None if direction is None else _read(direction)

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return self.scores(evidence) > self.ratio

    def scores(self, evidence: Evidence) -> Tensor:
        """Projections in median lengths of the picture: `[b n]`."""
        candidates = evidence.candidates()
        direction = self.direction
        if direction is not None and len(direction) != evidence.x.shape[2]:
            raise ValueError(
                f"mask.detector.direction has {len(direction)} numbers, and the host's tokens "
                f"have {evidence.x.shape[2]} channels; expected one a channel."
            )
        along, typical = ops.principal_projection(evidence.x, candidates, direction)
        return (along / typical.clamp(min=1e-30)).masked_fill(~candidates, -torch.inf)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"


def _read(direction: str | Sequence[float]) -> Tensor:
    try:
        values = np.load(Path(direction)) if isinstance(direction, str) else direction
        found = torch.as_tensor(values, dtype=torch.double)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"mask.detector.direction={direction!r}: expected a list of numbers or a .npy file "
            f"({error})."
        ) from error
    if found.ndim != 1 or not torch.isfinite(found).all() or not found.norm() > 0:
        raise ValueError(
            f"mask.detector.direction: expected finite numbers, one a channel and not all zero, "
            f"got shape {tuple(found.shape)}."
        )
    return found
