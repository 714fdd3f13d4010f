"""Type II controls growth better than Type I."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import SMALL, Finding, Mean, Plot, Verdict, compared, only
from fna_lab.finding.lab import Lab


class Type2ControlsGrowth(Finding):
    """The largest sink at the end, with every sink sunk, with and without its own diagonal."""

    number = 4
    claim = "Type II masking controls the growth of massive tokens better than Type I."
    source = "sinking_variations (MTA)"
    plot = Plot(
        "points",
        {"plain": "untouched", "type1": "Type I", "type2": "Type II"},
        "largest norm of a sink (medians)",
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Largest norm among sinks after the last block, in medians untouched, `[b]` each."""
        sinks = lab.sinks()
        chosen = lab.of_patches(sinks)
        some = chosen.any(1)
        traces = {"plain": lab.plain()}
        traces |= {name: lab.without(sinks, name, "sink") for name in ("type1", "type2")}
        unit = lab.medians(lab.norms(lab.plain().hidden[-1]))[:, 0]
        return {
            name: only(
                lab.norms(trace.hidden[-1]).masked_fill(~chosen, -torch.inf).amax(1) / unit, some
            )
            for name, trace in traces.items()
        }

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:  # noqa: ARG002
        """On the mean log ratio of the two, in pairs."""
        ratio = Mean.of((found["type2"] / found["type1"]).log())
        says = "largest norm of a sink: {change} under Type II than Type I, over {n} {samples}"
        return compared(ratio, 0.0, says, "log_ratio", above=False, small=SMALL)
