"""MAE has no massive activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Mean, Plot, Verdict
from fna_lab.finding.lab import Lab

SIZE, RATIO = 100.0, 1000.0
LEAST = 1e-3  # a median of 0, in a model with silent channels, would make any ratio infinite


class NoMassiveInMae(Finding):
    """Largest activation of any block, in medians of its block.

    Massive = above 100 and about 1,000 times the median magnitude (Sun et al. 2024).
    """

    number = 5
    claim = "MAE has no massive activations."
    source = "negative control (MTA); the definition is that of Sun et al. 2024"
    plot = Plot(
        "points",
        {"ratio": "largest activation"},
        "magnitude (medians of the block)",
        level=RATIO,
        log=True,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Largest |activation| over blocks in medians, its size, and whether any is massive."""
        tops, ratios = [], []
        for hidden in lab.plain().hidden:
            size = hidden.abs().float()
            if lab.kept is not None:
                size = size.masked_fill(~lab.kept[..., None], torch.nan)
            size = size.flatten(1)
            tops.append(size.masked_fill(size.isnan(), 0.0).amax(1))
            ratios.append(tops[-1] / size.nanmedian(1).values.clamp(min=LEAST))
        top, ratio = torch.stack(tops), torch.stack(ratios)
        massive = ((top > SIZE) & (ratio > RATIO)).any(0)
        return {"ratio": ratio.amax(0).double(), "top": top.amax(0).double(),
                "massive": massive.double()}  # fmt: skip

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """On the share of pictures with a massive activation, for MAE; of others it is told."""
        share, ratio, top = (Mean.of(found[name]) for name in ("massive", "ratio", "top"))
        assert share is not None and ratio is not None and top is not None
        text = (
            f"{share.value * share.count:.0f} of {share.count} {{samples}} have massive "
            f"activations, the largest of one is {top.value:.3g} in size (massive: above {SIZE:g})"
            f" and {ratio.said()} medians of its block (above {RATIO:g})"
        )
        numbers = {**share.numbers("share"), **ratio.numbers("ratio")}
        if "mae" not in backbone.name.lower():
            return Verdict(None, f"this backbone is no MAE: {text}", numbers)
        return Verdict(share.value == 0, text, numbers)
