"""Massive tokens: norms far above the median of the picture."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector


class NormRatioDetector(Detector):
    """Patch tokens whose norm exceeds a multiple of the picture's median patch norm.

    Args:
        ratio: that multiple.

    Raises:
        ValueError: `ratio` is not positive.
    """

    def __init__(self, *, ratio: float = 3.0) -> None:
        if not ratio > 0:
            raise ValueError(f"mask.detector.ratio={ratio}: expected a number > 0.")
        self.ratio = ratio

    def __call__(self, evidence: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """Hidden states `[b n c]` -> bool `[b n]`."""
        return ops.norm_ratio(evidence, prefix=num_prefix_tokens, ratio=self.ratio)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"
