"""How often a guard did not believe the solver."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

KINDS = ("heads", "ridge", "exact")


class Fallbacks(Metric):
    """Counts of a guard by layer.

    Args:
        layers: blocks of the host.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        zeros = torch.zeros(layers, len(KINDS), dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, before: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        """Add what a guard counted between two looks at its `counts`."""
        for layer, counts in after.items():
            more = counts - before[layer] if layer in before else counts
            self.counts[layer] += more.to(self.counts.device)

    def compute(self) -> dict[str, dict[str, int]]:
        """Block -> `heads` of pictures seen, `ridge`: tried with it, `exact`: done exactly."""
        return {
            f"{layer:02d}": dict(zip(KINDS, row, strict=True))
            for layer, row in enumerate(self.counts.tolist())
            if row[0]
        }
