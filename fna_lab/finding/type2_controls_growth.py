"""Type II controls growth better than Type I."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Lab, Mean, Plot, Verdict, compared, only


class Type2ControlsGrowth(Finding):
    """The norm that masked massive tokens have at the end, with and without their own diagonal."""

    number = 4
    claim = "Type II masking controls the growth of massive tokens better than Type I."
    source = "sinking_variations (MTA)"
    plot = Plot(
        "points",
        {"plain": "untouched", "type1": "Type I", "type2": "Type II"},
        "largest norm of a massive token (medians)",
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Largest norm among massive tokens behind the last block, in medians, `[b]` each."""
        chosen = lab.of_patches(lab.massive())
        some = chosen.any(1)
        traces = {
            "plain": lab.plain(),
            "type1": lab.oneshot("type1", "mask"),
            "type2": lab.oneshot("type2", "mask"),
        }
        unit = lab.norms(lab.plain().hidden[-1]).median(1).values
        return {
            name: only(
                lab.norms(trace.hidden[-1]).masked_fill(~chosen, -torch.inf).amax(1) / unit, some
            )
            for name, trace in traces.items()
        }

    def verdict(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:  # noqa: ARG002
        """On the mean log ratio of the two, in pairs."""
        ratio = Mean.of((found["type2"] / found["type1"]).log())
        says = "largest norm of a massive token, log(Type II / Type I) = {mean} over {n} pictures"
        return compared(ratio, 0.0, says, "log_ratio", above=False)
