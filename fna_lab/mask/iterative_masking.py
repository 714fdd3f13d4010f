"""Iterative masking: sinks are found one a round and taken out before softmax."""

from __future__ import annotations

from typing import Any

from fna_lab.mask.base import Mask
from fna_lab.mask.detector.base import Detector
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.ops import check_pattern


class IterativeMaskingMask(Mask):
    """Round by round the strongest sink is taken out before softmax: the others grow.

    Args:
        pattern: which pairs are taken away, a name of `ops.PATTERNS`.
        detector: finds the sinks; None = `cls_proxy` at ratio 1.
        **common: see `Mask`.

    Raises:
        ValueError: the pattern is unknown, or would leave whole rows without a key.
    """

    def __init__(
        self, *, pattern: str = "type1", detector: Detector | None = None, **common: Any
    ) -> None:
        detector = detector or ClsProxyDetector(ratio=1.0)
        super().__init__(detector=detector, stage="mask", schedule="iterative", **common)
        self.pattern = check_pattern(pattern, "mask", "mask.")
