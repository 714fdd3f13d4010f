"""Published findings on token anatomy, each with a verdict on this backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fna_lab.finding.base import named_findings
from fna_lab.finding.lab import Lab
from fna_lab.settings import check_integer
from fna_lab.task.base import Task, embed_classes


class Findings(Task):
    """Measures each finding on every picture, then says whether it holds.

    Interventions are the findings' own: `attn` and `mask` stay exact and none.

    Args:
        findings: names of files of `fna_lab.finding`; None = all.
        rounds: most rounds of iterative schedules.
        cost: measure latency and memory on the first batch.
        **common: see `Task`.

    Raises:
        ValueError: a finding does not exist, or attention is replaced or masked already.
    """

    figures = True

    def __init__(
        self,
        *,
        findings: Sequence[str] | None = None,
        rounds: int = 24,
        cost: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(cost=cost, **common)
        check_integer("task.rounds", rounds, least=2)
        attn, mask = self.patched.attn.name, self.patched.mask.name
        if (attn, mask) != ("exact", "none"):
            raise ValueError(
                f"task=findings with attn={attn}, mask={mask}: expected attn=exact and mask=none, "
                "for each finding replaces and masks attention by itself."
            )
        self.findings = named_findings(findings)
        self.rounds = rounds
        self._texts: Tensor | None = None
        self._samples = "pictures"
        self._tokens: dict[str, list[Tensor]] = {}
        self._noted: dict[str, dict[str, list[Tensor]]] = {f.name: {} for f in self.findings}

    def on_test_start(self) -> None:
        """Embed the classes, where the backbone has texts and the data labels."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._samples = data.samples
        if self.backbone.has_text and data.classnames is not None:
            self._texts = embed_classes(self.backbone, data.classnames, data.templates)

    def step(self, batch: dict[str, Any]) -> None:
        """Measure every finding on one batch."""
        lab = Lab(
            self.backbone,
            batch["image"],
            labels=batch.get("label"),
            texts=self._texts,
            rounds=self.rounds,
        )
        rows = [
            {"index": int(batch["index"][i]), "name": name} for i, name in enumerate(batch["name"])
        ]
        for column, values in lab.massive_facts().items():
            self._tokens.setdefault(column, []).append(values.cpu())
        for finding in self.findings:
            for column, values in finding.measure(lab).items():
                self._noted[finding.name].setdefault(column, []).append(values.cpu())
                if values.ndim == 1:
                    for row, value in zip(rows, values.tolist(), strict=True):
                        row[f"{finding.name}/{column}"] = value
        self.rows += rows

    def results(self) -> dict[str, float]:
        """The verdicts' numbers, as `<finding>/<number>`; `holds` is 1 or 0, absent where open."""
        found = super().results()
        tokens = {name: torch.cat(parts) for name, parts in self._tokens.items()}
        some = tokens["massive"] > 0
        self.extra["massive_tokens"] = {
            "pictures": len(some),
            "with_some": int(some.sum()),
            "mean": tokens["massive"].double().mean().item(),
            "norm_medians": tokens["norm"][some].mean().item() if some.any() else None,
        }
        self.extra["findings"] = []
        for finding in self.findings:
            columns = {c: torch.cat(parts) for c, parts in self._noted[finding.name].items()}
            verdict = finding.verdict(columns, self.backbone, self._samples)
            numbers = dict(verdict.numbers)
            if verdict.holds is not None:
                numbers["holds"] = float(verdict.holds)
            found |= {f"{finding.name}/{key}": value for key, value in numbers.items()}
            self.arrays |= {f"{finding.name}/{c}": v.numpy() for c, v in columns.items()}
            plot = vars(finding.plot) | {"columns": dict(finding.plot.columns)}
            self.extra["findings"].append(
                {
                    "name": finding.name,
                    "number": finding.number,
                    "claim": finding.claim,
                    "source": finding.source,
                    "holds": verdict.holds,
                    "says": verdict.says,
                    "plot": plot,
                }
            )
        return found
