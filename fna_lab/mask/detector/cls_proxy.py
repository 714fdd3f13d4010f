"""Massive tokens and sinks: tokens that CLS attends to, compared with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive


class ClsProxyDetector(Detector):
    """Tokens t with a[CLS, t] > ratio a[CLS, CLS]; 1.0 finds sinks, 0.3 massive tokens.

    A host without CLS is judged by incoming attention: nine uniform shares stand in for
    a[CLS, CLS], which at ratio 1.0 is the published rule (`ops.incoming_sinks`, `raw`).

    Args:
        ratio: the threshold.
        top: at most so many tokens of a picture; None = no limit.
        least: a[CLS, t] must also exceed so many uniform shares 1 / n. 0 as published, where CLS
            that attends evenly, itself included, draws almost every token into T; 3 leaves such
            pictures alone.
        finds: the class of its tokens, `massive` or `artifact`; None = `artifact` from ratio 1
            on, as sinks, else `massive`.

    Raises:
        ValueError: a setting is out of range.
    """

    reads = "attention"

    def __init__(
        self,
        *,
        ratio: float = 0.3,
        top: int | None = None,
        least: float = 0.0,
        finds: str | None = None,
    ) -> None:
        check_positive("ratio", ratio)
        check_positive("least", least, zero=True)
        if top is not None and (type(top) is not int or top < 1):
            raise ValueError(f"mask.detector.top={top!r}: expected an integer >= 1 or null.")
        if finds not in (None, "massive", "artifact"):
            raise ValueError(f"mask.detector.finds={finds!r}: expected massive, artifact or null.")
        self.ratio = ratio
        self.top = top
        self.least = least
        self.finds = ("massive" if ratio < 1 else "artifact") if finds is None else finds

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`; registers are never returned."""
        if evidence.has_cls:
            known = ~evidence.candidates()
            row = evidence.cls_row()
            found = ops.cls_proxy(row, ratio=self.ratio, top=self.top, found=known)
            tokens = ops.num_kept(evidence.kept, row.shape[-1])
            return found & (row[:, :, 0].mean(1) * tokens > self.least)
        scores = self.scores(evidence)
        found = scores > self.ratio
        if self.top is None:
            return found
        best = scores.topk(min(self.top, scores.shape[1]), dim=1).indices
        return found & torch.zeros_like(found).scatter(1, best, True)

    def scores(self, evidence: Evidence) -> Tensor:
        """a[CLS, t] / a[CLS, CLS], heads averaged, or what stands in for it: `[b n]`."""
        if evidence.has_cls:
            row = evidence.cls_row()[:, :, 0].mean(1)
            return (row / row[:, :1]).masked_fill(~evidence.candidates(), -torch.inf)
        _, shares = ops.incoming_sinks(
            evidence.incoming_share(), prefix=evidence.num_prefix_tokens, found=evidence.gone
        )
        return shares / ops.INCOMING_RULES["raw"]

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"
