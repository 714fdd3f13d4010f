"""Time, memory and coverage against the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from fna_lab.report import canvas
from fna_lab.report.figure import COLOURS, MARKERS
from fna_lab.report.timings import WHAT, Rows, device, inputs, label


def draw(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path) -> list[Path]:  # noqa: ARG001
    """The figure of a run of task=timing."""
    facts = record["timing"]
    path = folder / "timing.png"
    said = WHAT[facts["part"]]
    plot(facts["rows"], path, f"{said[0].upper()}{said[1:]}\n{inputs(facts)}; {device(record)}")
    return [path]


def plot(rows: Rows, path: Path, title: str) -> None:
    """Draw latency, and memory where measured, against tokens: a row for each batch and dtype."""
    keys = [("ms", "latency (ms), median and quartiles")]
    keys += [("peak_mib", "peak memory (MiB)")] if "peak_mib" in rows[0] else []
    keys += [("coverage", "coverage radius (of farthest points)")] if "coverage" in rows[0] else []
    cases = list(dict.fromkeys((row["batch"], row["dtype"]) for row in rows))
    size = (max(4.2 * len(keys), 6.0), 1.0 + 3.6 * len(cases))
    figure = Figure(figsize=size, layout="constrained")
    names = list(dict.fromkeys(label(row) for row in rows))
    panels = figure.subplots(len(cases), len(keys), squeeze=False)
    for case, line in zip(cases, panels, strict=True):
        mine = [row for row in rows if (row["batch"], row["dtype"]) == case]
        for axes, (key, said) in zip(line, keys, strict=True):
            _panel(axes, mine, names, key)
            axes.set(xlabel="tokens", ylabel=said, title=f"batch {case[0]}, {case[1]}")
            axes.title.set_fontsize(9)
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        handles=[drawn[name] for name in names], loc="outside lower center",
        ncols=min(len(names), 5), frameon=False, fontsize=9,
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    canvas.save(figure, path)


def _panel(axes: Axes, rows: Rows, names: list[str], key: str) -> None:
    """One quantity of one batch and dtype, a line for each name."""
    for i, name in enumerate(names):
        mine = [r for r in rows if label(r) == name]
        sizes, values = [r["tokens"] for r in mine], [r[key] for r in mine]
        style: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7]}
        style |= {"markersize": 5, "linestyle": ("-", "--", ":")[i // 7 % 3]}
        axes.plot(sizes, values, label=name, **style)
        if key == "ms":
            low, high = ([r[f"{end}_ms"] for r in mine] for end in ("low", "high"))
            axes.fill_between(sizes, low, high, color=COLOURS[i % 7], alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    if key == "coverage":
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    else:
        axes.set_yscale("log")
        canvas.plain_log(axes.yaxis)
    every = sorted({r["tokens"] for r in rows})
    axes.xaxis.set_major_locator(FixedLocator(every))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([f"{size:,}" for size in every])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
