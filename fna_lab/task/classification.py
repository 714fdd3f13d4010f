"""Accuracy of the patched model: zero-shot, by nearest neighbours, by its own head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.metric.accuracy import ClassAccuracy, knn_guesses
from fna_lab.task.base import Task, embed_classes

log = logging.getLogger(__name__)
PROTOCOLS = ("zero_shot", "knn", "head")


class Classification(Task):
    """Accuracy and balanced accuracy by every protocol that backbone and data allow.

    `zero_shot`: the mean text embedding of each class over all templates (Radford et al. 2021).
    `knn`: weighted votes of a labelled bank, embedded by the same patched model (the protocol of
    DINOv2). `head`: the backbone's own classifier.

    Args:
        protocols: which to run; None = all that are possible.
        knn_k: numbers of neighbours.
        temperature: of the votes.
        **common: see `Task`.

    Raises:
        ValueError: a protocol is unknown, or impossible with this backbone and data.
    """

    def __init__(
        self,
        *,
        protocols: Sequence[str] | None = None,
        knn_k: Sequence[int] = (10, 20),
        temperature: float = 0.07,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        unknown = set(protocols or ()) - set(PROTOCOLS)
        if unknown:
            raise ValueError(
                f"task.protocols={list(protocols or ())}: {sorted(unknown)[0]!r} is none of "
                f"{', '.join(PROTOCOLS)}."
            )
        if not knn_k or any(type(k) is not int or k < 1 for k in knn_k):
            raise ValueError(f"task.knn_k={list(knn_k)}: expected a list of integers >= 1.")
        if not temperature > 0:
            raise ValueError(f"task.temperature={temperature!r}: expected a number > 0.")
        self.asked = protocols
        self.knn_k = tuple(knn_k)
        self.temperature = temperature
        self.protocols: list[str] = []
        self._texts: Tensor | None = None
        self._bank: tuple[Tensor, Tensor] | None = None

    def on_test_start(self) -> None:
        """Settle the protocols; embed the texts and the bank."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        classes = data.classnames
        if classes is None:
            raise ValueError(
                f"task=classification needs labels, and data={data.name} has none; use task="
                "fidelity, or data.labels=true with class folders."
            )
        refusals = self._refusals(data, len(classes))
        for name in self.asked or ():
            if name in refusals:
                raise ValueError(f"task.protocols={list(self.asked or ())}: {refusals[name]}")
        self.protocols = [p for p in (self.asked or PROTOCOLS) if p not in refusals]
        if not self.protocols:
            raise ValueError(f"task=classification: {' '.join(refusals.values())}")
        for name in self._names():
            for balanced in (False, True):
                key = f"{name}_balanced_accuracy" if balanced else f"{name}_accuracy"
                metric = ClassAccuracy(len(classes), balanced=balanced)
                self.scores[key] = metric.to(self.device)
        if "zero_shot" in self.protocols:
            self._texts = embed_classes(self.backbone, classes, data.templates)
        if "knn" in self.protocols:
            with self.patched.uncounted():
                self._bank = self._embed_bank(data)

    def step(self, batch: dict[str, Any]) -> None:
        """Predict by every protocol."""
        features = F.normalize(self.features(batch["image"]).pooled.float(), dim=-1)
        guesses: dict[str, Tensor] = {}
        if self._texts is not None:
            guesses["zero_shot"] = (features @ self._texts.mT).argmax(1)
        if self._bank is not None:
            guesses |= knn_guesses(
                features,
                self._bank,
                num_classes=len(self.trainer.datamodule.classnames),  # type: ignore[attr-defined]
                ks=self.knn_k,
                temperature=self.temperature,
            )
        if "head" in self.protocols:
            guesses["head"] = self.backbone.logits(batch["image"]).argmax(1)
        for name, guess in guesses.items():
            self.score(f"{name}_accuracy").update(guess, batch["label"])
            self.score(f"{name}_balanced_accuracy").update(guess, batch["label"])
        for i, name in enumerate(batch["name"]):
            label = int(batch["label"][i])
            row: dict[str, Any] = {"index": int(batch["index"][i]), "name": name, "label": label}
            for protocol, guess in guesses.items():
                row[f"{protocol}_guess"] = int(guess[i])
                row[f"{protocol}_correct"] = int(guess[i]) == label
            self.rows.append(row)

    def _names(self) -> list[str]:
        names = [p for p in self.protocols if p != "knn"]
        return names + [f"knn{k}" for k in self.knn_k if "knn" in self.protocols]

    def _refusals(self, data: Any, num_classes: int) -> dict[str, str]:
        """Why a protocol is impossible here, in words."""
        refusals = {}
        if not self.backbone.has_text:
            refusals["zero_shot"] = f"zero_shot: backbone={self.backbone.name} has no text tower."
        if self.backbone.num_classes != num_classes:
            refusals["head"] = (
                f"head: backbone={self.backbone.name} has a head of {self.backbone.num_classes} "
                f"classes, and data={data.name} has {num_classes}."
            )
        try:
            bank = data.bank()
        except (NotImplementedError, FileNotFoundError) as error:
            refusals["knn"] = f"knn: {error}"
        else:
            if len(bank) < max(self.knn_k):
                refusals["knn"] = (
                    f"knn: task.knn_k={list(self.knn_k)} wants more neighbours than the "
                    f"{len(bank)} pictures of the bank."
                )
        return refusals

    @torch.no_grad()
    def _embed_bank(self, data: Any) -> tuple[Tensor, Tensor]:
        loader = data.bank_dataloader()
        features, labels = [], []
        for i, batch in enumerate(loader):
            images = batch["image"].to(self.device)
            found = self.backbone(images).pooled
            features.append(F.normalize(found.float(), dim=-1))
            labels.append(batch["label"].to(self.device))
            if i % 10 == 0:
                log.info("k-NN bank: %d of %d pictures", i * data.batch_size, len(loader.dataset))
        return torch.cat(features), torch.cat(labels)
