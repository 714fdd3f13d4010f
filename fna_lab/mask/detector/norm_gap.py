"""Massive tokens: those above the largest gap of the sorted log norms of a picture."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector


class NormGapDetector(Detector):
    """The published heuristic, taken for each picture on its own and with a least gap.

    Args:
        min_gap: least gap in natural log units; 0 always finds something.

    Raises:
        ValueError: `min_gap` is negative.
    """

    def __init__(self, *, min_gap: float = 0.5) -> None:
        if min_gap < 0:
            raise ValueError(f"mask.detector.min_gap={min_gap}: expected a number >= 0.")
        self.min_gap = min_gap

    def __call__(self, evidence: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """Hidden states `[b n c]` -> bool `[b n]`."""
        return ops.norm_gap(
            evidence, prefix=num_prefix_tokens, per_picture=True, min_gap=self.min_gap
        )

    @property
    def threshold(self) -> str:
        return f"min_gap={self.min_gap}"
