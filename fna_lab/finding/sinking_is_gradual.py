"""Sinking spreads attention gradually, masking drops it suddenly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Mean, Plot, Verdict, compared, only
from fna_lab.finding.lab import Lab


class SinkingIsGradual(Finding):
    """Follows the strongest sink that is left, round by round, in two branches.

    As published, each round's token is found in the masking branch, and taken out in both. A
    branch is the more sudden, the larger its largest drop is in its whole drop.
    """

    number = 2
    claim = "Sinking spreads attention gradually, masking drops it suddenly."
    source = "sinking_variations (MTA)"
    plot = Plot(
        "series",
        {"masking": "masked", "sinking": "sunk"},
        "strongest sink that is left,\na[CLS, t] / a[CLS, CLS]",
        level=1.0,
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Strengths `[b r]` after 0, 1, ... tokens (NaN where no more are), suddenness `[b]`."""
        ranks = lab.iterative("mask").ranks
        assert ranks is not None
        rounds = ranks.amax(1)
        found = {}
        for name, stage in (("masking", "mask"), ("sinking", "sink")):
            series = []
            for taken in range(lab.rounds + 1):
                if taken > int(rounds.max()):
                    series.append(torch.full_like(rounds, torch.nan, dtype=torch.double))
                    continue
                left = lab.strongest((ranks > 0) & (ranks <= taken), stage).double()
                series.append(only(left, (rounds >= taken) & (rounds > 0)))
            found[name] = torch.stack(series, dim=1)
            found[f"{name}_suddenness"] = only(_suddenness(found[name]), rounds >= 2)
        return found

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:  # noqa: ARG002
        """On the mean difference of suddenness, in pairs."""
        masking, sinking = (found[f"{name}_suddenness"] for name in ("masking", "sinking"))
        difference, masked, sunk = Mean.of(masking - sinking), Mean.of(masking), Mean.of(sinking)
        if difference is None or masked is None or sunk is None:
            return Verdict(None, "no {sample} here has two sinks to take out")
        says = (
            f"the largest single drop is {masked.value:.0%} of the whole fall under masking, "
            f"{sunk.value:.0%} under sinking: difference {{mean}} over {{n}} {{samples}}"
        )
        return compared(difference, 0.0, says, "suddenness_difference", above=True, small=0.05)


def _suddenness(strength: Tensor) -> Tensor:
    """Largest fall from one round to the next in units of all falls: `[b r]` -> `[b]`."""
    falls = (strength[:, :-1] - strength[:, 1:]).nan_to_num(0).clamp(min=0)
    return falls.amax(1) / falls.sum(1).clamp(min=1e-12)
