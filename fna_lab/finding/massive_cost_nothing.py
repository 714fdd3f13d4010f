"""Masking massive tokens costs nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import NONE_TAKEN, Finding, Mean, Plot, Verdict, only
from fna_lab.finding.lab import Given, Lab
from fna_lab.mask.type1 import Type1Mask

ACCURACY, COSINE = 0.01, 0.99


class MassiveCostNothing(Finding):
    """Features and accuracy with massive tokens sunk, and with as many other patches sunk."""

    number = 7
    claim = "Masking massive tokens costs nothing."
    source = "sink_massive_13_23 (MTA): T2I R@1 39.62 -> 39.64, I2T 36.92 -> 37.24"
    plot = Plot(
        "points",
        {"massive": "massive tokens\nsunk", "random": "as many other\npatches sunk"},
        "cosine with the untouched features",
        level=1.0,
    )

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Cosines of the pooled features, and right or wrong where classes are known, `[b]`."""
        massive = lab.massive()
        some = massive.any(1)
        random = lab.run(mask=Type1Mask(stage="sink", detector=Given(_others(lab, massive))))
        plain = lab.plain().features
        found = {}
        for name, trace in (("massive", lab.oneshot("type1", "sink")), ("random", random)):
            a, b = trace.features.pooled.double(), plain.pooled.double()
            found[name] = only(torch.cosine_similarity(a, b, dim=-1), some)
            right, before = lab.correct(trace.features), lab.correct(plain)
            if right is not None and before is not None:
                found[f"{name}_accuracy_change"] = only(right - before, some)
        return found

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:  # noqa: ARG002
        """On accuracy (within one point) where it can tell, else on the cosine (0.99)."""
        means = {name: Mean.of(values) for name, values in found.items()}
        numbers = {k: v for name, m in means.items() if m for k, v in m.numbers(name).items()}
        cosine, random = means["massive"], means["random"]
        if cosine is None or random is None:
            return Verdict(None, NONE_TAKEN)
        text = f"cosine {_said(cosine)} against {_said(random)} for as many other patches"
        holds = _clear(cosine.low, cosine.high, COSINE)
        change = means.get("massive_accuracy_change")
        if change is None:
            return Verdict(holds, f"{text}, over {cosine.count} {{samples}}", numbers)
        # Where no picture changes the bootstrap sees no doubt: one in 3 / n may (rule of three).
        doubt = 3 / change.count if change.low == change.high else 0.0
        told = _clear(change.low - doubt, change.high + doubt, -ACCURACY)
        text = f"accuracy changes by {change.said('+.2g')} over {change.count} {{samples}}; {text}"
        if told is not None:
            return Verdict(told, text, numbers)
        return Verdict(holds, f"{text}; by the cosine: these are too few for a point", numbers)


def _said(cosine: Mean) -> str:
    """A mean cosine with its interval; by what is missing where it is nearly 1."""
    missing = 1 - cosine.value
    if missing > 1e-3:
        return cosine.said(".4g")
    return f"1 - {missing:.1g}" if missing > 1e-7 else "1"


def _clear(low: float, high: float, level: float) -> bool | None:
    """Whether an interval lies above a level (True), below it (False), or on it (None)."""
    return True if low > level else False if high < level else None


def _others(lab: Lab, massive: Tensor) -> Tensor:
    """As many patch tokens outside of T, the same draw for every picture: bool `[b n]`."""
    size, prefix = massive.shape[1], lab.backbone.num_prefix_tokens
    draw = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(massive.device)
    draw[:prefix] = -1
    draw = draw.expand_as(massive).masked_fill(massive, -1)
    if lab.kept is not None:
        draw = draw.masked_fill(~lab.kept, -1)
    order = draw.argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)
    free = lab.others(massive).sum(1, keepdim=True)
    return rank < torch.minimum(massive.sum(1, keepdim=True), free)
