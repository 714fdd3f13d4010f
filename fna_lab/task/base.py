"""What every task shares: the backbone, its patch, rows of samples, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from fna_lab.metric import cost
from fna_lab.metric.attention_error import AttentionError
from fna_lab.metric.fallbacks import Fallbacks

if TYPE_CHECKING:
    from fna_lab.backbone.base import Backbone, Features
    from fna_lab.backbone.patch import Patch


class Task(L.LightningModule):
    """A test loop over pictures.

    Args:
        backbone: the model.
        patched: its patch.
        exact: a patch of the same blocks with exact attention, for the clock.
        cost: measure latency and memory on the first batch.
        meter: measure the error of every replaced attention, block by block.

    Attributes:
        rows: one dict a sample, for `samples.parquet`.
        scores: the metrics by name; all are logged, and all are results.
        found: the results, after the test.
        costs: the cost on the first batch.
        errors: what the meter found, see `AttentionError`; empty without one.
        fallbacks: what the variant's guard counted, see `Fallbacks`; empty without one.
        extra: further plain parts of the record, by name.
        arrays: NumPy arrays by name, for `arrays.npz`; set with the results.
        reads: whether it measures on pictures, so that `data=none` is refused.
        figures: whether `fna_lab.report` draws figures of such a run when it is finished.
    """

    reads = True
    figures = False

    def __init__(
        self,
        *,
        backbone: Backbone,
        patched: Patch,
        exact: Patch,
        cost: bool = True,
        meter: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.patched = patched
        self.exact = exact
        self.exact.enabled = False
        self.measure_cost = cost
        self.rows: list[dict[str, Any]] = []
        self.costs: dict[str, float | None] = {}
        self.found: dict[str, float] = {}
        self.errors: dict[str, Any] = {}
        self.fallbacks: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        self.scores = nn.ModuleDict({"n": SumMetric()})
        self.meter = None
        if meter:
            self.meter = AttentionError(backbone.depth, backbone.num_heads, exact.attn)
        self.counter = None if patched.attn.guard is None else Fallbacks(backbone.depth)

    def refuse_extra_tokens(self) -> None:
        """Refuse variants and masks that append tokens, where a task needs every token's class.

        Raises:
            ValueError: naming both.
        """
        attn, mask = self.patched.attn, self.patched.mask
        if mask.appends:
            raise ValueError(
                f"task={self.name} with mask={mask.name} and a concatenation: the tokens that it "
                "appends are of no class; expected a mask that appends none."
            )
        if attn.num_extra_tokens:
            raise ValueError(
                f"task={self.name} with attn={attn.name}: the {attn.num_extra_tokens} tokens that "
                "it appends are of no class; expected a variant that appends none."
            )

    @property
    def name(self) -> str:
        """The task's name in `conf/task`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Refuse data without pictures, before anything is measured.

        Raises:
            ValueError: `data=none`, and the task is none that measures without pictures.
        """
        if self.reads and self.trainer.datamodule.name == "none":  # type: ignore[attr-defined]
            raise ValueError(
                f"data=none: task={self.name} measures on pictures; expected data that has some, "
                "such as data=photos."
            )

    @torch.no_grad()
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure one batch; the first one also tells the cost."""
        guard = self.patched.attn.guard
        before = dict(guard.counts) if guard else {}
        self.patched.meter = self.meter.attend if self.meter else None
        try:
            done = len(self.rows)
            self.step(batch)
            self._note_tokens(self.rows[done:])
        finally:
            self.patched.meter = None
        if guard and self.counter:
            self.counter.update(before, guard.counts)
        self.score("n").update(len(batch["image"]))
        for name, metric in self.scores.items():
            # Lightning looks for the attribute once; a later batch may bring a new metric.
            where, size = f"scores.{name}", len(batch["image"])
            self.log(
                name,
                metric,  # type: ignore[arg-type]
                on_step=False,
                on_epoch=True,
                batch_size=size,
                metric_attribute=where,
            )
        if batch_idx == 0 and self.measure_cost:
            with self.patched.uncounted():
                self.costs = self._cost(batch["image"])

    def _note_tokens(self, rows: list[dict[str, Any]]) -> None:
        """Write down which tokens a mask found in each picture, in the order of its rounds."""
        tokens, ranks = self.patched.tokens, self.patched.ranks
        if tokens is None or ranks is None or len(tokens) != len(rows):
            return
        for row, mine, order in zip(rows, tokens, ranks, strict=True):
            places = mine.nonzero()[:, 0]
            row["mask_tokens"] = places[order[places].argsort(stable=True)].tolist()
            row["mask_rounds"] = int(order.max())

    def step(self, batch: dict[str, Any]) -> None:
        """Update the metrics and rows with one batch."""
        raise NotImplementedError

    def score(self, name: str) -> Metric:
        """A metric by its name."""
        metric = self.scores[name]
        assert isinstance(metric, Metric)
        return metric

    def on_test_epoch_end(self) -> None:
        """Turn the metrics into plain numbers, before Lightning resets them.

        Raises:
            RuntimeError: fewer or more samples were measured than the data set has.
        """
        self.found = self.results()
        self.errors = self.meter.compute() if self.meter else {}
        self.fallbacks = self.counter.compute() if self.counter else {}
        expected = self.trainer.datamodule.describe()["count"]  # type: ignore[attr-defined]
        if self.found["n"] != expected:
            raise RuntimeError(f"measured {self.found['n']:.0f} samples of {expected}")

    def results(self) -> dict[str, float]:
        """The metrics as plain numbers by name; `n` is the number of samples."""
        return {name: float(self.score(name).compute()) for name in self.scores}

    def features(self, images: Tensor) -> Features:
        """Features of the patched model.

        Raises:
            ValueError: they are not finite.
        """
        found = self.backbone(images)
        if not torch.isfinite(found.pooled).all():
            raise ValueError(
                f"backbone={self.backbone.name} gives features that are NaN or infinite under "
                f"attn={self.patched.attn.name}, mask={self.patched.mask.name}."
            )
        return found

    def work(self, images: Tensor) -> None:
        """What the clock measures on a batch of pictures."""
        self.backbone(images)

    def _cost(self, images: Tensor) -> dict[str, float | None]:
        patched, exact, device = self.patched, self.exact, images.device

        def run() -> None:
            self.work(images)

        def run_exact() -> None:
            patched.enabled, exact.enabled = False, True
            try:
                self.work(images)
            finally:
                patched.enabled, exact.enabled = True, False

        times = cost.latency({"exact": (run_exact, exact), "patched": (run, patched)}, device)
        flops = cost.flops(
            patched.attn,
            tokens=self.backbone.num_tokens,
            heads=self.backbone.num_heads,
            embed_dim=self.backbone.embed_dim,
            layers=len(patched.attn_layers),
        )
        found: dict[str, float | None] = {"batch": len(images), "tokens": self.backbone.num_tokens}
        for name, row in times.items():
            found |= {
                f"{name}_{part}_ms": 1e3 * row[part]
                for part in row
                if part not in ("rounds", "totals")
            }
        found["rounds"] = times["patched"]["rounds"]
        found["speedup"] = cost.ratio(times, "exact", "patched")
        found["exact_peak_mib"] = cost.peak_memory(run_exact, device) / 2**20
        found["patched_peak_mib"] = cost.peak_memory(run, device) / 2**20
        return found | flops


@torch.no_grad()
def embed_classes(backbone: Backbone, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot weights: the mean unit text embedding of each class over all templates `[c e]`.

    Source: Radford et al. 2021, section 3.1.4.
    """
    means = []
    for start in range(0, len(classes), 64):
        some = classes[start : start + 64]
        texts = [template.format(name) for name in some for template in templates]
        found = backbone.encode_text(texts).unflatten(0, (len(some), -1))
        means.append(found.mean(1))
    return F.normalize(torch.cat(means).float(), dim=-1)
