"""What every mask strategy is: a set of tokens, a pattern of pairs, a stage."""

from __future__ import annotations

from fna_lab import ops
from fna_lab.mask.detector.base import Detector
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector


class Mask:
    """Takes a pattern of (query, key) pairs of the detected tokens out of attention.

    Args:
        stage: `mask` = before softmax (the other weights grow), `sink` = after it (the mass is
            lost).
        detector: finds T, once, in the same forward pass; None = `cls_proxy`.
        detect: block whose input (or attention) the detector reads; None = the backbone's.
        layers: blocks whose attention is masked; None = from the backbone's mask block on.

    Attributes:
        pattern: a name of `ops.PATTERNS`, or None for no mask at all.

    Raises:
        ValueError: the stage is unknown.
    """

    pattern: str | None = None

    def __init__(
        self,
        *,
        stage: str = "mask",
        detector: Detector | None = None,
        detect: int | None = None,
        layers: object = None,
    ) -> None:
        if stage not in ops.STAGES:
            raise ValueError(f"mask.stage={stage!r}: expected one of {', '.join(ops.STAGES)}.")
        self.stage = stage
        self.detector = detector or ClsProxyDetector()
        self.detect = detect
        self.layers = layers

    @property
    def name(self) -> str:
        """The strategy's name in `conf/mask`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]
