"""Massive tokens grow without attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fna_lab.attn.base import NoAttention
from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import SMALL, Finding, Mean, Plot, Verdict, compared, only
from fna_lab.finding.lab import Lab


class GrowthWithoutAttention(Finding):
    """Growth from the restart to the detection block with attention switched off between them."""

    number = 6
    claim = "Massive tokens grow without attention: the MLP makes them."
    source = "mlp_growth (MTA)"
    plot = Plot(
        "points",
        {
            "massive_on": "massive,\nwith attention",
            "massive_off": "massive,\nwithout",
            "normal_on": "other patches,\nwith attention",
            "normal_off": "other patches,\nwithout",
        },
        "growth of the norm (factor)",
        level=1.0,
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Mean factors of growth, `[b]` each."""
        anatomy = lab.backbone.anatomy
        first = max(anatomy.restart, 1)  # what block 0 receives is not kept
        last = max(anatomy.detect - 1, first)
        off = lab.run(NoAttention(), layers=range(first, last + 1))
        chosen, others = lab.of_patches(lab.massive()), lab.others(lab.massive())
        found = {}
        for name, trace in (("on", lab.plain()), ("off", off)):
            growth = lab.norms(trace.hidden[last]) / lab.norms(trace.hidden[first - 1])
            growth = growth.double().log()
            for kind, mine in (("massive", chosen), ("normal", others)):
                mean = growth.where(mine, 0.0).sum(1) / mine.sum(1)
                found[f"{kind}_{name}"] = only(mean.exp(), chosen.any(1))
        return found

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """On how much more massive tokens grow than others with attention off, if they grow."""
        massive, normal = found["massive_off"].log(), found["normal_off"].log()
        ratio, growth, others = Mean.of(massive - normal), Mean.of(massive), Mean.of(normal)
        if ratio is None or growth is None or others is None:
            return compared(None, 0.0, "", "log_growth", above=True)
        first, last = max(backbone.anatomy.restart, 1), backbone.anatomy.detect - 1
        says = (
            f"blocks {first}-{max(first, last)} without attention: norms grow by a factor of "
            f"{math.exp(growth.value):.3g} in massive tokens and {math.exp(others.value):.3g} in "
            "others ({change}), over {n} {samples}"
        )
        verdict = compared(ratio, 0.0, says, "log_growth", above=True, small=SMALL)
        numbers = {**verdict.numbers, **growth.numbers("log_growth_massive")}
        if verdict.holds and growth.high < 0:  # others shrink even more, but these do not grow
            return Verdict(False, f"{verdict.says}; but massive tokens shrink", numbers)
        return Verdict(verdict.holds, verdict.says, numbers)
