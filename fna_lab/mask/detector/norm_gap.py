"""Massive tokens: those above the largest gap of the sorted log norms of a picture."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive, token_norms


class NormGapDetector(Detector):
    """The published heuristic, taken for each picture on its own and with a least gap.

    Args:
        min_gap: least gap in natural log units; 0 always finds something.

    Raises:
        ValueError: `min_gap` is negative.
    """

    def __init__(self, *, min_gap: float = 0.5) -> None:
        check_positive("min_gap", min_gap, zero=True)
        self.min_gap = min_gap

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return (
            ops.norm_gap(
                evidence.x,
                prefix=evidence.num_prefix_tokens,
                per_picture=True,
                min_gap=self.min_gap,
                kept=evidence.kept,
            )
            & evidence.candidates()
        )

    def scores(self, evidence: Evidence) -> Tensor:
        """Norms in medians of the picture: `[b n]`."""
        return token_norms(evidence)

    @property
    def threshold(self) -> str:
        return f"min_gap={self.min_gap}"
