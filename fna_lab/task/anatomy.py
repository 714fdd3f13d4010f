"""Which tokens stand out, block by block, by every detector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from fna_lab.metric.anatomy import token_facts
from fna_lab.task.base import Task

if TYPE_CHECKING:
    from fna_lab.attn.base import Context


class Anatomy(Task):
    """Norms, massive tokens and attention sinks at the input of every block.

    Facts are means over pictures, `<fact>/<block>`; see `token_facts`. With a data set that knows
    its segmentation, `background` is the share of patches without any object, which is what
    `top_on_background` would be if the most attended patch were any patch.

    Args:
        cost: measure latency and memory on the first batch.
        **common: see `Task`.
    """

    def __init__(self, *, cost: bool = False, **common: Any) -> None:
        super().__init__(cost=cost, **common)

    def step(self, batch: dict[str, Any]) -> None:
        """Look at every block of the patched model."""
        objects = self._objects(batch)
        noted: dict[str, Tensor] = {}

        def observe(q: Tensor, k: Tensor, context: Context) -> None:
            facts = token_facts(q, k, context, objects)
            noted.update({f"{name}/{context.layer:02d}": fact for name, fact in facts.items()})

        with self.patched.observed(observe):
            self.features(batch["image"])
        if objects is not None:
            noted["background"] = (objects == 0).double().mean(1)
        for name in sorted(noted, key=lambda n: n.split("/")[1:]):
            if name not in self.scores:
                self.scores[name] = MeanMetric().set_dtype(torch.float64).to(self.device)
            self.score(name).update(noted[name])
        for i, name in enumerate(batch["name"]):
            row = {"index": int(batch["index"][i]), "name": name}
            self.rows.append(row | {key: float(value[i]) for key, value in noted.items()})

    def _objects(self, batch: dict[str, Any]) -> Tensor | None:
        """Share of each patch that objects cover `[b p]`."""
        if "segmentation" not in batch:
            return None
        covered = (batch["segmentation"] > 0).float()[:, None]
        return F.adaptive_avg_pool2d(covered, self.backbone.grid).flatten(1)
