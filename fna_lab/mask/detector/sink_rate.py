"""Sinks: tokens that draw much of the attention in many heads."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.settings import check_number


class SinkRateDetector(Detector):
    """Patch tokens whose incoming attention exceeds `epsilon` in more than a share of the heads.

    Args:
        epsilon: least mean attention over the queries that makes a token a sink of a head; 0.3 as
            published for the first token of language models.
        share: share of the heads, from 0 (any head) to below 1.

    Raises:
        ValueError: a setting is out of range.
    """

    reads = "attention"
    finds = "artifact"

    def __init__(self, *, epsilon: float = 0.3, share: float = 0.0) -> None:
        between = {"above": 0, "below": 1}
        check_number("mask.detector.epsilon", epsilon, "a number between 0 and 1", **between)
        check_number("mask.detector.share", share, "a number, 0 to below 1", least=0, below=1)
        self.epsilon = epsilon
        self.share = share

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        rate = ops.sink_rate(evidence.incoming(), epsilon=self.epsilon)
        return (rate > self.share) & evidence.candidates()

    def scores(self, evidence: Evidence) -> Tensor:
        """Share of the heads; of equal shares, the one that draws more first: `[b n]`."""
        incoming = evidence.incoming()
        # Mean attention is below 1, so that this never outweighs a head.
        drawn = incoming.mean(1) / incoming.shape[1]
        rate = ops.sink_rate(incoming, epsilon=self.epsilon)
        return (rate + drawn).masked_fill(~evidence.candidates(), -float("inf"))

    @property
    def threshold(self) -> str:
        return f"epsilon={self.epsilon}"
