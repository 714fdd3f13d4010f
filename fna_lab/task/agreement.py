"""Whether detectors agree with each other, and with themselves on changed pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fna_lab.backbone.neurons import NeuronTap, find_register_neurons
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.metric import agreement
from fna_lab.settings import check_integer, check_number, is_whole
from fna_lab.task.base import Task

if TYPE_CHECKING:
    from fna_lab.attn.base import Context

log = logging.getLogger(__name__)

CHANGES = ("flip", "crop", "resolution", "seed")


class Agreement(Task):
    """Several detectors on the same pictures at the same block.

    Results are `found/<detector>` (tokens a picture), `<measure>/<detector>/<other>` with the
    measures `iou`, `precision`, `recall` (of the first against the second) and `spearman` (of
    their scores over the patch tokens), and the same detector before and after a change of the
    picture, token by token in the same place: `stable_iou/<change>/<detector>` and
    `stable_spearman/<change>/<detector>`. What is undefined, as the IoU of two detectors that
    find nothing, is left out. Changes: `flip` (left to right), `crop` (the middle, enlarged),
    `resolution` (drawn with fewer pixels; the grid of tokens stays), `seed` (noise). Sentences are
    not changed.

    Args:
        detectors: by name.
        names: those that are compared; None = all that the host can serve.
        block: at whose input and attention they look; None = the backbone's detection block.
        crop: share of the side that a crop keeps.
        resolution: share of the pixels along a side that are kept.
        noise: standard deviation of the noise, in units of the normalised pictures.
        seed: of the noise.
        calibration: pictures by which `register_neurons` without a list finds its neurons.
        cost: measure latency and memory on the first batch.
        **common: see `Task`.

    Attributes:
        skipped: detectors that the host cannot serve, and why.

    Raises:
        ValueError: a setting is out of range, or the model is masked.
    """

    def __init__(
        self,
        *,
        detectors: Mapping[str, Detector],
        names: Sequence[str] | None = None,
        block: int | None = None,
        crop: float = 0.75,
        resolution: float = 0.5,
        noise: float = 0.1,
        seed: int = 0,
        calibration: int = 16,
        cost: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(cost=cost, **common)
        self.refuse_extra_tokens()
        self.asked = names is not None
        names = list(detectors) if names is None else list(names)
        unknown = [name for name in names if name not in detectors]
        if unknown or len(set(names)) < max(len(names), 2):
            raise ValueError(
                f"task.names={names}: expected two or more different names of "
                f"{', '.join(detectors)}."
            )
        depth = self.backbone.depth
        self.block = self.backbone.anatomy.detect if block is None else block
        if not is_whole(self.block) or not 0 <= self.block < depth:
            raise ValueError(f"task.block={block!r}: expected a block from 0 to {depth - 1}.")
        for name, value in (("crop", crop), ("resolution", resolution)):
            check_number(f"task.{name}", value, "a number between 0 and 1", above=0, below=1)
        check_number("task.noise", noise, "a number > 0", above=0)
        check_integer("task.calibration", calibration)
        if self.patched.mask.looks:
            raise ValueError(
                f"mask={self.patched.mask.name}: task=agreement compares detectors on a model "
                "whose tokens are all there; expected mask=none."
            )
        self.detectors = {name: detectors[name] for name in names}
        self.crop = crop
        self.resolution = resolution
        self.noise = noise
        self.seed = seed
        self.calibration = calibration
        self.skipped: dict[str, str] = {}
        self.prepared: dict[str, Any] = {}
        self.taps: dict[str, NeuronTap] = {}
        self.found_sum = torch.zeros(0)
        self.pairs = agreement.SetAgreement((0,))
        self.stable = agreement.SetAgreement((0,))
        self.has_changes = False

    def on_test_start(self) -> None:
        """Prepare every detector by the weights; leave out those that the host cannot serve.

        Raises:
            ValueError: a detector that was asked for cannot be served, or fewer than two can.
            NotImplementedError: likewise.
        """
        for name, detector in list(self.detectors.items()):
            try:
                self._prepare(name, detector)
            except (ValueError, NotImplementedError) as error:
                if self.asked:
                    raise
                self.skipped[name] = str(error)
                del self.detectors[name]
                log.warning("task=agreement leaves out %s: %s", name, error)
        if len(self.detectors) < 2:
            raise ValueError(
                f"task=agreement: of its detectors the host serves {list(self.detectors)} alone; "
                "expected two or more."
            )
        k = len(self.detectors)
        self.found_sum = torch.zeros(k, dtype=torch.long, device=self.device)
        self.pairs = agreement.SetAgreement((k, k)).to(self.device)
        self.stable = agreement.SetAgreement((len(CHANGES), k)).to(self.device)

    def on_test_end(self) -> None:
        """Take the hooks that read neurons away."""
        for tap in self.taps.values():
            tap.remove()

    def step(self, batch: dict[str, Any]) -> None:
        """Look at the pictures as they are, and changed."""
        images: Tensor = batch["image"]
        found, scores, grid = self._look(images)
        self.found_sum += found.sum((1, 2))
        kept = self.backbone.kept(images)
        if kept is not None:
            kept = kept[:, self.backbone.num_prefix_tokens :]
        pair = found[:, None], found[None], scores[:, None], scores[None], kept
        self.pairs.update(*pair)
        pairs = agreement.by_picture(*pair)
        stable = self._changed(batch, found, scores, grid) if images.is_floating_point() else {}
        for i, name in enumerate(batch["name"]):
            row = {"index": int(batch["index"][i]), "name": name}
            self.rows.append(row | self._facts(found, pairs, stable, i))

    def _changed(
        self, batch: dict[str, Any], found: Tensor, scores: Tensor, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Look at changed pictures; `iou` and `spearman` of each, `[t k b]`."""
        images: Tensor = batch["image"]
        befores, afters = [], []
        seeds = [self.seed + i for i in batch["index"].tolist()]
        for change in (
            agreement.flipped(images),
            agreement.cropped(images, self.crop),
            agreement.coarsened(images, self.resolution),
            agreement.noisy(images, self.noise, seeds),
        ):
            *after, other = self._look(change.images)
            places = change.places(grid, other)
            befores.append((found[..., places], scores[..., places]))
            afters.append(after)
        before, after = (map(torch.stack, zip(*some, strict=True)) for some in (befores, afters))
        (sets, heights), (sets_after, heights_after) = before, after
        change = sets, sets_after, heights, heights_after  # [t k b p]
        self.stable.update(*change)
        self.has_changes = True
        return agreement.by_picture(*change)

    def results(self) -> dict[str, float]:
        """Numbers by name; what is undefined is left out."""
        found = super().results()
        names = list(self.detectors)
        for name, total in zip(names, self.found_sum.tolist(), strict=True):
            found[f"found/{name}"] = total / found["n"]
        for measure, table in self.pairs.compute().items():
            for first, row in zip(names, table.tolist(), strict=True):
                for second, value in zip(names, row, strict=True):
                    found[f"{measure}/{first}/{second}"] = value
        stable = self.stable.compute() if self.has_changes else {}
        for measure, table in stable.items():
            if measure not in ("iou", "spearman"):
                continue
            for change, row in zip(CHANGES, table.tolist(), strict=True):
                for name, value in zip(names, row, strict=True):
                    found[f"stable_{measure}/{change}/{name}"] = value
        return {name: value for name, value in found.items() if value == value}

    def _facts(
        self, found: Tensor, pairs: dict[str, Tensor], stable: dict[str, Tensor], i: int
    ) -> dict[str, float | None]:
        """One picture's row of `samples.parquet`; None where a number is undefined."""
        names = list(self.detectors)
        facts: dict[str, float] = {}
        for a, first in enumerate(names):
            facts[f"found/{first}"] = float(found[a, i].sum())
            for b, second in enumerate(names[a + 1 :], a + 1):
                for measure, table in pairs.items():
                    facts[f"{measure}/{first}/{second}"] = float(table[a, b, i])
            for t, change in enumerate(CHANGES):
                for measure, table in stable.items():
                    facts[f"stable_{measure}/{change}/{first}"] = float(table[t, a, i])
        return {key: value if value == value else None for key, value in facts.items()}

    def _prepare(self, name: str, detector: Detector) -> None:
        if detector.reads == "neurons" and not detector.neurons:
            pictures = self.trainer.datamodule.calibration(self.calibration)  # type: ignore[attr-defined]
            if self.block < 1:
                raise ValueError(f"task.block={self.block}: no neurons run before block 0.")
            with self.patched.disabled():
                neurons = find_register_neurons(
                    self.backbone.host,
                    pictures.to(self.device),
                    run=self.backbone,
                    blocks=self.backbone.blocks_path,
                    prefix=self.backbone.num_prefix_tokens,
                    outliers_at=self.block - 1,
                    kept=self.backbone.kept(pictures),
                )
            detector.neurons = neurons
        self.prepared[name] = detector.prepare(self.patched.blocks, self.block)
        self.taps[name] = NeuronTap(self.patched.blocks, detector.neurons)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """What every detector finds in patch tokens, and scores: `[k b p]`; and their grid."""
        seen: list[tuple[Tensor, Tensor, tuple[int, int]]] = []

        def observe(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:  # noqa: ARG001
            if context.layer == self.block:
                seen.append(self._judge(q, k, context))

        with self.patched.observed(observe):
            self.features(images)
        return seen[-1]

    def _judge(
        self, q: Tensor, k: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        found, scores, prefix = [], [], context.num_prefix_tokens
        for name, detector in self.detectors.items():
            evidence = Evidence(
                context.x,
                prefix,
                context.has_cls,
                grid=context.grid,
                q=q,
                k=k,
                scale=context.scale,
                bias=context.attn_mask,
                kept=context.kept,
                neurons=self.taps[name].read(),
                prepared=self.prepared[name],
            )
            found.append(detector(evidence)[:, prefix:])
            scores.append(detector.scores(evidence)[:, prefix:].double())
        grid = self.backbone.grid if context.grid is None else context.grid
        return torch.stack(found), torch.stack(scores), grid
