"""The patched model against its exact self, on any pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from fna_lab.hosts import noted
from fna_lab.metric.fidelity import (
    LayerError,
    NeighbourAgreement,
    cosine,
    mean_over,
    relative_errors,
)
from fna_lab.task.base import Task

if TYPE_CHECKING:
    from fna_lab.backbone.base import Features


class Fidelity(Task):
    """Cosine of CLS, pooled and patch features, error by layer, nearest-neighbour agreement.

    Args:
        **common: see `Task`.
    """

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        names = ["pooled_cosine", "patch_cosine"]
        if self.backbone.has_cls:
            names.insert(0, "cls_cosine")
        for name in names:
            self.scores[name] = MeanMetric().set_dtype(torch.float64)
        self.scores["neighbour_agreement"] = NeighbourAgreement()
        self.layer_error = LayerError(self.backbone.depth)

    def step(self, batch: dict[str, Any]) -> None:
        """Run both models on the same pictures and compare."""
        with self.patched.disabled():
            exact, exact_hidden = self._run(batch["image"])
        found, hidden = self._run(batch["image"])
        kept = self.backbone.kept(batch["image"])
        errors = relative_errors(exact_hidden, hidden, kept)
        self.layer_error.update(errors)
        values = {
            "pooled_cosine": cosine(found.pooled, exact.pooled),
            "patch_cosine": mean_over(cosine(found.patches, exact.patches), kept),
        }
        if found.cls is not None and exact.cls is not None:
            values["cls_cosine"] = cosine(found.cls, exact.cls)
        for name, value in values.items():
            self.score(name).update(value)
        self.score("neighbour_agreement").update(exact.pooled, found.pooled)
        for i, name in enumerate(batch["name"]):
            row = {"index": int(batch["index"][i]), "name": name}
            row |= {key: float(value[i]) for key, value in values.items()}
            self.rows.append(row | {"last_layer_error": float(errors[i, -1])})

    def results(self) -> dict[str, float]:
        """The metrics as plain numbers by name; errors as `layer_error/<block>`."""
        found = super().results()
        if found["n"] < 3:
            del found["neighbour_agreement"]  # two pictures are each other's only neighbour
        errors = self.layer_error.compute().tolist()
        return found | {f"layer_error/{i:02d}": error for i, error in enumerate(errors)}

    def _run(self, images: Tensor) -> tuple[Features, list[Tensor]]:
        with noted(self.patched.blocks) as hidden:
            return self.features(images), hidden
