"""Massive tokens and sinks: tokens that CLS attends to, compared with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector


class ClsProxyDetector(Detector):
    """Tokens t with a[CLS, t] > ratio a[CLS, CLS]; 1.0 finds sinks, 0.3 massive tokens.

    Args:
        ratio: the threshold.
        top: at most so many tokens of a picture; None = no limit.

    Raises:
        ValueError: a setting is out of range.
    """

    reads = "cls_row"

    def __init__(self, *, ratio: float = 0.3, top: int | None = None) -> None:
        if not ratio > 0:
            raise ValueError(f"mask.detector.ratio={ratio}: expected a number > 0.")
        if top is not None and (not isinstance(top, int) or top < 1):
            raise ValueError(f"mask.detector.top={top!r}: expected an integer >= 1 or null.")
        self.ratio = ratio
        self.top = top

    def __call__(self, evidence: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """The row of CLS `[b h 1 n]` -> bool `[b n]`; registers are never returned."""
        prefix = torch.arange(evidence.shape[-1], device=evidence.device) < num_prefix_tokens
        known = prefix.expand(evidence.shape[0], -1)
        return ops.cls_proxy(evidence, ratio=self.ratio, top=self.top, found=known)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"
