"""The largest activation after Type I lies in CLS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Mean, Plot, Verdict, compared, only
from fna_lab.finding.lab import Lab


class Type1PeakInCls(Finding):
    """Where the largest activation after the last block is, under Type I and untouched."""

    number = 3
    claim = "The largest activation after Type I masking lies in CLS."
    source = "masking patterns (MTA)"
    plot = Plot(
        "points",
        {"plain": "untouched", "type1": "all sinks masked\n(Type I)"},
        "largest activation of CLS /\nlargest of patch tokens",
        level=1.0,
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Largest |activation| of CLS over that of the patch tokens, `[b]` each."""
        some = lab.sinks().any(1) & torch.tensor(lab.backbone.has_cls)
        prefix = lab.backbone.num_prefix_tokens
        found = {}
        for name, trace in (("plain", lab.plain()), ("type1", lab.iterative("mask"))):
            size = trace.hidden[-1].abs().amax(2)
            if lab.kept is not None:
                size = size * lab.kept
            found[name] = only(size[:, 0] / size[:, prefix:].amax(1), some)
        return found

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """On the share of pictures whose largest activation is in CLS."""
        if not backbone.has_cls:
            return Verdict(None, "this backbone has no CLS")
        shares = {}
        for name, ratio in found.items():
            shares[name] = Mean.of(only(ratio > 1, ratio.isfinite()))
        says = "share of {n} {samples} with the largest activation in CLS: {mean}"
        verdict = compared(shares["type1"], 0.5, says, "share_type1", above=True)
        if shares["plain"] is None:
            return verdict
        plain = shares["plain"]
        untouched = f"untouched {plain.value:.3g}"
        if verdict.holds and plain.low > 0.5:
            untouched += ", so it is not the mask that puts it there"
        numbers = {**verdict.numbers, **plain.numbers("share_plain")}
        return Verdict(verdict.holds, f"{verdict.says} ({untouched})", numbers)
