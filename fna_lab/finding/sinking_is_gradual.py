"""Sinking spreads attention gradually, masking drops it suddenly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Lab, Mean, Plot, Trace, Verdict, compared, only


class SinkingIsGradual(Finding):
    """Follows the strongest sink that is left, round by round.

    A schedule is the more sudden, the larger its largest drop from one round to the next is in
    its whole drop.
    """

    number = 2
    claim = "Sinking spreads attention gradually, masking drops it suddenly."
    source = "sinking_variations (MTA)"
    plot = Plot(
        "series",
        {"masking": "iterative masking", "sinking": "iterative sinking"},
        "strongest sink, a[CLS, t] / a[CLS, CLS]",
        level=1.0,
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Strengths by round `[b r]`, 0 once nothing is left, and how sudden they fall `[b]`."""
        found = {}
        series = {name: _strengths(lab.iterative(stage), lab.rounds)
                  for name, stage in (("masking", "mask"), ("sinking", "sink"))}  # fmt: skip
        enough = torch.stack([(s > 0).sum(1) >= 2 for s in series.values()]).all(0)
        for name, strength in series.items():
            found[name] = strength
            found[f"{name}_suddenness"] = only(_suddenness(strength), enough)
            found[f"{name}_rounds"] = only((strength > 0).sum(1), strength[:, 0] > 0)
        return found

    def verdict(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:  # noqa: ARG002
        """On the mean difference of suddenness, in pairs."""
        difference = Mean.of(found["masking_suddenness"] - found["sinking_suddenness"])
        says = "share of the largest single drop, masking - sinking = {mean} over {n} pictures"
        verdict = compared(difference, 0.0, says, "suddenness_difference", above=True)
        rounds = {}
        for name in ("masking", "sinking"):
            mean = Mean.of(found[f"{name}_rounds"])
            rounds |= mean.numbers(f"{name}_rounds") if mean else {}
        if verdict.numbers:
            text = ", ".join(f"{n} {rounds[f'{n}_rounds']:.1f}" for n in ("masking", "sinking"))
            return Verdict(verdict.holds, f"{verdict.says}; rounds: {text}",
                           {**verdict.numbers, **rounds})  # fmt: skip
        if rounds:
            return Verdict(None, "no picture needs two rounds of both schedules", rounds)
        return verdict


def _strengths(trace: Trace, rounds: int) -> Tensor:
    """Score of the token that each round took: `[b r]`, 0 where a round took none."""
    assert trace.ranks is not None and trace.strengths is not None
    series = trace.strengths.new_zeros((len(trace.ranks), rounds + 1), dtype=torch.double)
    return series.scatter_add(1, trace.ranks, trace.strengths.double())[:, 1:]


def _suddenness(strength: Tensor) -> Tensor:
    """Largest drop between rounds in units of all drops; the end at 1, below which no sink is."""
    level = strength.clamp(min=1.0)
    drops = (level[:, :-1] - level[:, 1:]).clamp(min=0)
    last = (level[:, -1] - 1).clamp(min=0)[:, None]  # where rounds were cut short
    drops = torch.cat([drops, last], dim=1)
    return drops.amax(1) / drops.sum(1).clamp(min=1e-12)
