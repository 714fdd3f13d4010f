"""Massive tokens: norms above a fixed value."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive, token_norms


class NormFixedDetector(Detector):
    """Patch tokens whose norm exceeds a value that is known for the model.

    Published for the residual stream before the final norm: 150 for DINOv2-L at the next to last
    block (Darcet et al. 2024 and Jiang et al. 2025), 30 for CLIP ViT-B/16 at the last.

    Args:
        norm: the threshold, in the units of the host's hidden states.

    Raises:
        ValueError: `norm` is not positive.
    """

    def __init__(self, *, norm: float = 150.0) -> None:
        check_positive("norm", norm)
        self.norm = norm

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        found = ops.norm_fixed(evidence.x, prefix=evidence.num_prefix_tokens, norm=self.norm)
        return found & evidence.candidates()

    def scores(self, evidence: Evidence) -> Tensor:
        """Norms in medians of the picture: `[b n]`."""
        return token_norms(evidence)

    @property
    def threshold(self) -> str:
        return f"norm={self.norm}"
