"""Massive tokens and sinks: tokens that CLS attends to, compared with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence


class ClsProxyDetector(Detector):
    """Tokens t with a[CLS, t] > ratio a[CLS, CLS]; 1.0 finds sinks, 0.3 massive tokens.

    Args:
        ratio: the threshold.
        top: at most so many tokens of a picture; None = no limit.

    Raises:
        ValueError: a setting is out of range.
    """

    reads = "attention"

    def __init__(self, *, ratio: float = 0.3, top: int | None = None) -> None:
        if not ratio > 0:
            raise ValueError(f"mask.detector.ratio={ratio}: expected a number > 0.")
        if top is not None and (not isinstance(top, int) or top < 1):
            raise ValueError(f"mask.detector.top={top!r}: expected an integer >= 1 or null.")
        self.ratio = ratio
        self.top = top

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`; registers are never returned."""
        known = ~evidence.candidates()
        return ops.cls_proxy(evidence.cls_row(), ratio=self.ratio, top=self.top, found=known)

    def scores(self, evidence: Evidence) -> Tensor:
        """a[CLS, t] / a[CLS, CLS], heads averaged: `[b n]`."""
        row = evidence.cls_row()[:, :, 0].mean(1)
        return (row / row[:, :1]).masked_fill(~evidence.candidates(), -torch.inf)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"
