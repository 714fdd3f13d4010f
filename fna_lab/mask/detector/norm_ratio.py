"""Massive tokens: norms far above the median of the picture."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive, token_norms


class NormRatioDetector(Detector):
    """Patch tokens whose norm exceeds a multiple of the picture's median patch norm.

    Args:
        ratio: that multiple.

    Raises:
        ValueError: `ratio` is not positive.
    """

    def __init__(self, *, ratio: float = 3.0) -> None:
        check_positive("ratio", ratio)
        self.ratio = ratio

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        prefix, kept = evidence.num_prefix_tokens, evidence.kept
        found = ops.norm_ratio(evidence.x, prefix=prefix, ratio=self.ratio, kept=kept)
        return found & evidence.candidates()

    def scores(self, evidence: Evidence) -> Tensor:
        """Norms in medians of the picture: `[b n]`."""
        return token_norms(evidence)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"
