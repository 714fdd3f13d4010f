"""The figure of each finding: what its verdict rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fna_lab.report import canvas
from fna_lab.report.figure import COLOURS, MARKERS
from fna_lab.report.record import samples
from fna_lab.report.verdicts import WORDS

WAYS = ("ignore", "guarantee", "exclude")
LEAST = 1e-3  # of a cosine: what an axis shows at least


def draw(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path) -> list[Path]:
    """A figure a finding, from what the run left.

    Args:
        record: of the run.
        arrays: of the run, `<finding>/<column>`.
        folder: where the pictures go.
    """
    paths = []
    for found in record["findings"]:
        name, plot = found["name"], found["plot"]
        columns = {c: arrays[f"{name}/{c}"] for c in plot["columns"]}
        if not any(np.isfinite(values).any() for values in columns.values()):
            continue  # nothing to see, and the verdict says why
        title = f"{found['claim']}\n{WORDS[found['holds']][0]} here"
        if plot["kind"] == "grid":
            figure, panels = canvas.sheet(record, title, 1, 3, size=(3.4, 3.4))
            _grid(figure, panels[0], columns, plot["unit"])
        else:
            figure, panels = canvas.sheet(record, title, size=(6.4, 3.8))
            {"points": _points, "series": _series}[plot["kind"]](
                panels[0, 0], columns, plot, samples(record)
            )  # fmt: skip
        paths.append(canvas.save(figure, folder / f"{name}.png"))
    return paths


def _points(
    axes: Axes, columns: Mapping[str, np.ndarray], plot: Mapping[str, Any], unit: str
) -> None:
    """A dot a picture, and the mean with its interval (1.96 standard errors)."""
    scatter = np.random.default_rng(0)
    for i, values in enumerate(columns.values()):
        known = values[np.isfinite(values)]
        if len(known) == 0:
            continue
        x = i + scatter.uniform(-0.18, 0.18, len(known))
        axes.plot(x, known, ".", color=COLOURS[i % 7], alpha=0.35, markersize=4)
        # Means of ratios on a log axis are geometric, as the dots suggest.
        low, mean, high = _interval(np.log(known) if plot["log"] else known)
        ends = np.exp([low, mean, high]) if plot["log"] else (low, mean, high)
        axes.errorbar(
            [i],
            [ends[1]],
            [[ends[1] - ends[0]], [ends[2] - ends[1]]],
            fmt=MARKERS[i % 7],
            color="black",
            capsize=4,
            markersize=5,
        )
        axes.text(i + 0.22, ends[1], f"{ends[1]:.4g}", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [plot["columns"][name] for name in columns])
    axes.set_xlim(-0.6, len(columns) - 0.4)
    _finish(axes, plot)
    axes.set_xlabel(f"dots: {unit}; black: mean and 95 % interval", fontsize=8)


def _series(
    axes: Axes, columns: Mapping[str, np.ndarray], plot: Mapping[str, Any], unit: str
) -> None:
    """Means over the pictures that still find a token in that round, and how many those are."""
    for i, (name, values) in enumerate(columns.items()):
        values = values[np.isfinite(values[:, 0])]
        counts = np.isfinite(values).sum(0)
        rounds = np.flatnonzero(counts)
        means = np.nanmean(values[:, rounds], axis=0)
        label = f"{plot['columns'][name]} ({len(values)} {unit})"
        axes.plot(rounds, means, color=COLOURS[i], marker=MARKERS[i], markersize=5, label=label)
        for one in values[:40]:
            axes.plot(np.arange(len(one)), one, color=COLOURS[i], alpha=0.12, linewidth=0.8)
    axes.set_xlabel("tokens taken out")
    canvas.whole(axes.xaxis)
    _finish(axes, plot)
    axes.legend(frameon=False, fontsize=8)


def _grid(figure: Any, panels: Any, columns: Mapping[str, np.ndarray], unit: str) -> None:
    """Three panels (CLS), rows massive, columns artifact."""
    values = np.array([v.mean() for v in columns.values()]).reshape(3, 3, 3)
    high = values.max()
    low = min(values.min(), high - LEAST)
    for axes, cells, way in zip(panels, values, WAYS, strict=True):
        image = axes.imshow(cells, cmap=canvas.SEQUENTIAL, vmin=low, vmax=high)
        for i in range(3):
            for j in range(3):
                dark = cells[i, j] < (low + high) / 2
                axes.text(j, i, f"{cells[i, j]:.4f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(3), WAYS, fontsize=8)
        axes.set_yticks(range(3), WAYS, fontsize=8)
        axes.set_title(f"CLS: {way}", fontsize=9)
        axes.set_xlabel("artifact tokens")
        axes.set_ylabel("massive tokens")
    figure.colorbar(image, ax=list(panels), label=unit, shrink=0.8, format="%.4f")


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean - half, mean, mean + half


def _finish(axes: Axes, plot: Mapping[str, Any]) -> None:
    if plot["level"] is not None:
        axes.axhline(plot["level"], color="grey", linewidth=0.8, linestyle="--")
    if plot["log"]:
        axes.set_yscale("log")
        canvas.plain_log(axes.yaxis)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        if high - low < LEAST:  # do not blow up rounding
            axes.set_ylim(high - LEAST, high + 0.05 * LEAST)
    axes.set_ylabel(plot["unit"])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
