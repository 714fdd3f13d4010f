"""How long attention alone, or the selection of landmarks alone, takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torchmetrics import MeanMetric

from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.bench.attention import bench_attention
from fna_lab.bench.selection import bench_selection
from fna_lab.bench.settings import Settings
from fna_lab.task.base import Task

PARTS = ("attention", "selection")
# What of a row is a metric, too.
METRICS = ("ms", "selection_ms", "speedup", "peak_mib", "coverage")


class Timing(Task):
    """The benchmark of `python -m fna_lab.bench` as a run: its clock, its random inputs.

    No picture is read and the backbone is not run; it lends its heads where none are set. The
    run's own `attn`, unless it is exact, stands beside the variants that are named, with all of
    its settings; so does its sampler where samplers are timed.

    Args:
        part: `attention` = one attention call; `selection` = landmark samplers alone, on
            smooth random fields with heads x head_dim channels.
        heads: attention heads; None = the backbone's.
        head_dim: channels of a head; None = the backbone's.
        figures: draw the figure of the run.
        variants, samplers, tokens, batch, dtype, landmarks, masks, masked_tokens, exact_limit, \
slowest, rounds, least, seconds, memory: see `Settings`.
        **common: backbone and patches, see `Task`.

    Raises:
        ValueError: a setting is out of range, or one would do nothing here.
    """

    reads = False

    def __init__(
        self,
        *,
        part: str = "attention",
        variants: Sequence[str] | None = None,
        samplers: Sequence[str] | None = None,
        tokens: Sequence[int] = (197, 1370, 4097, 16385, 65537),
        batch: Sequence[int] = (1,),
        dtype: Sequence[str] = ("float32",),
        heads: int | None = None,
        head_dim: int | None = None,
        landmarks: int = 64,
        masks: Sequence[str] = (),
        masked_tokens: int = 4,
        exact_limit: int = 20000,
        slowest: float = 10,
        rounds: int = 15,
        least: int = 3,
        seconds: float = 10,
        memory: bool = True,
        figures: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(cost=False, **common)
        if part not in PARTS:
            raise ValueError(f"task.part={part!r}: expected one of {', '.join(PARTS)}.")
        if self.patched.mask.acts:
            raise ValueError(
                f"mask={self.patched.mask.name}: task=timing runs no model; expected mask=none, "
                "and task.masks=[type2-sink] or others."
            )
        own, sampler = self.patched.attn, getattr(self.patched.attn, "landmarks", None)
        if part == "selection" and own.name != "exact" and sampler is None:
            raise ValueError(
                f"attn={own.name}: it has no landmark sampler, and task.part=selection times "
                "those alone."
            )
        backbone = self.backbone
        width = backbone.embed_dim // backbone.num_heads
        self.part = part
        self.settings = Settings(
            variants=variants,
            samplers=samplers,
            tokens=tokens,
            batch=batch,
            dtype=dtype,
            heads=backbone.num_heads if heads is None else heads,
            head_dim=width if head_dim is None else head_dim,
            landmarks=landmarks,
            masks=masks,
            masked_tokens=masked_tokens,
            exact_limit=exact_limit,
            slowest=slowest,
            rounds=rounds,
            least=least,
            seconds=seconds,
            memory=memory,
            prefix="task.",
        )
        self.settings.check_used(part, "a model", "task.part=selection")
        self.figures = figures

    def on_test_start(self) -> None:
        """Refuse pictures, which would not be read.

        Raises:
            ValueError: the run has pictures.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.name != "none":
            raise ValueError(
                f"data={data.name}: task=timing reads no picture; expected data=none."
            )

    def step(self, batch: dict[str, Any]) -> None:  # noqa: ARG002
        """Measure everything, in the one step that there is."""
        settings = self.settings
        settings.device = self.device
        settings.progress = self.trainer.progress_bar_callback is not None
        found, notes = [], list[str]()
        for row in self._measured(notes.append):
            found.append(row)
            name = _label(row, settings)
            # At once, so that nobody who stops loses what was measured.
            about = {"index": len(self.rows), "name": f"{name}, {row['tokens']} tokens"}
            self.rows.append(about | row)
            for key in (key for key in METRICS if key in row):
                metric = MeanMetric().set_dtype(torch.float64).to(self.device)
                metric.update(torch.tensor(row[key], dtype=torch.float64, device=self.device))
                self.scores[f"{key}/{name}/{row['tokens']}".replace(".", "_")] = metric
        if not found:
            raise ValueError(f"task.tokens={list(settings.tokens)}: nothing fits; {notes[-1]}.")
        self.extra["timing"] = {
            "part": self.part,
            "heads": settings.heads,
            "head_dim": settings.head_dim,
            "landmarks": settings.landmarks,
            "notes": notes,
            "rows": found,
        }

    def _measured(self, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """The rows of the benchmark, with the run's own variant or its sampler."""
        own = self.patched.attn
        if self.part == "attention":
            return bench_attention(self.settings, say, None if own.name == "exact" else own)
        sampler = getattr(own, "landmarks", None)
        mine = isinstance(sampler, LandmarkSampler)
        return bench_selection(self.settings, say, (f"attn={own.name}", sampler) if mine else None)


def _label(row: dict[str, Any], settings: Settings) -> str:
    """A variant, its mask, and what else tells it from other rows."""
    parts = [f"{row['variant']} {row['mask']}" if "mask" in row else row["variant"]]
    parts += [f"batch {row['batch']}"] if len(settings.batch) > 1 else []
    return ", ".join([*parts, row["dtype"]] if len(settings.dtype) > 1 else parts)
