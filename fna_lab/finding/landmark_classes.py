"""Which token classes should be landmarks: CLS, massive and artifact tokens, in 27 settings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from fna_lab.backbone.base import Backbone
from fna_lab.finding.base import Finding, Mean, Plot, Verdict
from fna_lab.finding.lab import Lab

CLASSES = ("cls", "massive", "artifact")
WAYS = ("ignore", "guarantee", "exclude")
LEAST = 1e-6  # a smaller change of a cosine is rounding
SMALL = 0.005  # of a cosine: settings that differ by less are said to lie close together
CELLS = tuple(product(WAYS, repeat=3))


class LandmarkClasses(Finding):
    """Fidelity of the published attention with each class ignored, guaranteed or excluded."""

    number = 8
    claim = (
        "Always take CLS as a landmark, drop massive tokens, leave artifacts to the sampler; "
        "forcing artifacts in is the worst choice."
    )
    source = "landmark_class_grid (MTA): T2I R@1 34.10 for that setting, of 27.46 to 34.10"
    plot = Plot("grid", {"_".join(cell): "" for cell in CELLS}, "cosine with the exact features")

    landmarks = 64

    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Cosine of the pooled features in every cell, `[b]` each, and counts of the classes."""
        exact = lab.plain().features.pooled.double()
        num = min(self.landmarks, lab.backbone.num_tokens // 2)
        found = {}
        for cell in CELLS:
            ways = dict(zip(CLASSES, cell, strict=True))
            trace = lab.run(
                "fna_paper",
                num_landmarks=num,
                guarantee=[name for name in CLASSES if ways[name] == "guarantee"],
                exclude=[name for name in CLASSES if ways[name] == "exclude"],
            )
            pooled = trace.features.pooled.double()
            found["_".join(cell)] = torch.cosine_similarity(pooled, exact, dim=-1)
        massive = lab.massive()
        sinks = lab.sinks()
        found["massive_tokens"] = massive.sum(1).double()
        found["artifact_tokens"] = (sinks & ~massive).sum(1).double()
        return found

    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """On the three published choices, each against ignoring the class, in pairs."""
        best = max(CELLS, key=lambda cell: float(found["_".join(cell)].mean()))
        numbers = {f"cosine_{'_'.join(c)}": float(found["_".join(c)].mean()) for c in CELLS}
        said, holds = [], []
        # A guaranteed CLS, an excluded massive token, no forced artifact; the rest as published.
        best_cell, forced = "guarantee_exclude_ignore", "guarantee_exclude_guarantee"
        parts = (
            ("cls", "guaranteed CLS", best_cell, "ignore_exclude_ignore", 1),
            ("massive", "excluded massive", best_cell, "guarantee_ignore_ignore", 1),
            ("artifact", "forced artifacts", forced, best_cell, -1),
        )
        for name, words, cell, other, sign in parts:
            missing = not backbone.has_cls if name == "cls" else not found[f"{name}_tokens"].any()
            if missing:
                said.append(f"{words}: no such token")
                holds.append(None)
                continue
            mean = Mean.of(found[cell] - found[other])
            assert mean is not None
            change = mean.said("+.2g") if abs(mean.value) > LEAST else "no change"
            said.append(f"{words}: {change}")
            numbers |= mean.numbers(f"{name}_difference")
            up, down = mean.low > LEAST, mean.high < -LEAST
            holds.append(None if not (up or down) else up == (sign > 0))
        means = [float(found["_".join(cell)].mean()) for cell in CELLS]
        text = f"change of the cosine: {'; '.join(said)}; "
        if max(means) - min(means) < LEAST:
            text += "all 27 settings give the same features"
        else:
            text += f"{min(means):.4f} to {max(means):.4f} over 27 settings, the best of them "
            text += ", ".join(f"{name} {way}" for name, way in zip(CLASSES, best, strict=True))
            text += "; all lie close together" if max(means) - min(means) < SMALL else ""
        whole = False if False in holds else True if all(holds) else None
        return Verdict(whole, text, numbers)
