"""Iterative sinking leaves smaller tokens than iterative masking."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import SMALL, Finding, Mean, Plot, Verdict, compared, only
from fna_lab.finding.lab import Lab


class SinkingShrinks(Finding):
    """Compares the largest patch token after the detection block, once all sinks are out."""

    number = 1
    claim = "Iterative sinking leaves smaller tokens than iterative masking."
    source = "sinking_variations (MTA)"
    plot = Plot(
        "points",
        {"plain": "untouched", "masking": "iterative\nmasking", "sinking": "iterative\nsinking"},
        "largest patch norm (medians)",
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Largest norms in medians of the untouched picture, `[b]` each."""
        block = lab.backbone.anatomy.detect
        masked, sunk = lab.iterative("mask"), lab.iterative("sink")
        plain = lab.norms(lab.plain().hidden[block])
        unit = lab.medians(plain)[:, 0]
        assert masked.tokens is not None
        some = masked.tokens.any(1)  # the first round is the same in both
        return {
            "plain": only(plain.amax(1) / unit, some),
            "masking": only(lab.norms(masked.hidden[block]).amax(1) / unit, some),
            "sinking": only(lab.norms(sunk.hidden[block]).amax(1) / unit, some),
        }

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """On the mean log ratio of the two, in pairs."""
        ratio = Mean.of((found["sinking"] / found["masking"]).log())
        says = (
            f"largest norm after block {backbone.anatomy.detect}: "
            "{change} after sinking than after masking, over {n} {samples}"
        )
        return compared(ratio, 0.0, says, "log_ratio", above=False, small=SMALL)
