"""Runs as a figure: one metric against one setting, a line for every variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fna_lab.report import canvas
from fna_lab.report.record import counted
from fna_lab.report.settings import flatten

# Okabe and Ito's palette: told apart by colour-blind readers, and by brightness in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"


def plot(
    records: Sequence[Mapping[str, Any]], path: Path, *, x: str, y: Sequence[str], lines: str
) -> None:
    """Draw metrics against a setting, one panel a metric.

    Args:
        records: finished runs.
        path: the picture to write; its suffix says the format.
        x: a numeric setting, such as `attn.num_landmarks`.
        y: metrics, or `cost.<name>`.
        lines: the setting that makes a line, such as `attn`.

    Raises:
        ValueError: a name is in none of the runs, or `x` is no number in one.
    """
    points: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in y}
    for record in records:
        config = flatten(record["config"])
        values = record["metrics"] | {f"cost.{k}": v for k, v in record["cost"].items()}
        for name in y:
            if x in config and values.get(name) is not None:
                line = points[name].setdefault(str(config.get(lines, "-")), [])
                line.append((_number(config[x], x), float(values[name])))
    for name in y:
        if not points[name]:
            known = sorted({key for record in records for key in record["metrics"]})
            raise ValueError(
                f"no run has both {x} and {name}; the metrics are {', '.join(known)}, and "
                "cost.<name>."
            )
    figure = Figure(figsize=(4.6 * len(y), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(y), squeeze=False)[0], y, strict=True):
        for i, (line, values) in enumerate(sorted(points[name].items())):
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 5}
            axes.plot(*zip(*sorted(values), strict=True), label=line, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({value[0] for values in points[name].values() for value in values})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(x.rpartition(".")[2].replace("_", " "))
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    first = records[0]
    backbone, data = first["backbone"], first["data"]
    figure.suptitle(
        f"{backbone['name']}, {backbone['num_tokens']} tokens, blocks "
        f"{first['attn']['layers'][0]}-{first['attn']['layers'][-1]}; "
        f"{counted(first)} of {data['name']}",
        fontsize=10,
    )
    canvas.save(figure, path)


def _number(value: str, setting: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"{setting}={value} in one of the runs: expected a setting that is a number in all."
        ) from None
