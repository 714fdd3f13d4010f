"""What the figures of one run share: colours of token classes, headings, panels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fna_lab.report.record import counted, nature

# One colour and one marker a class in every figure, so that print without colour tells them too.
CLASS_COLOURS = {
    "cls": "#0072B2",
    "register": "#CC79A7",
    "massive": "#D55E00",
    "artifact": "#E69F00",
    "normal": "#009E73",
}
CLASS_MARKERS = {"cls": "o", "register": "D", "massive": "^", "artifact": "s", "normal": "v"}
CLASSES = list(CLASS_COLOURS)
NAMES = {"cls": "CLS"}
DIVERGING = "PuOr_r"
SEQUENTIAL = "viridis"


def heading(record: Mapping[str, Any]) -> str:
    """Backbone, data and what was done to the model, and what of it is made up."""
    backbone, data = record["backbone"], record["data"]
    drawn = " (synthetic)" if data.get("synthetic") else ""
    text = f"{backbone['name']}{nature(record)}, {backbone['num_tokens']} tokens; "
    text += f"{counted(record)} of {data['name']}{drawn}"
    attn, mask = record["attn"]["name"], record["mask"]["name"]
    return text if (attn, mask) == ("exact", "none") else f"{text}; attn={attn}, mask={mask}"


def sheet(
    record: Mapping[str, Any],
    title: str,
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float] = (4.2, 3.4),
    **settings: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure with a title, the heading below it, and panels `[rows columns]`."""
    width, height = size[0] * columns, size[1] * rows + 0.7
    figure = Figure(figsize=(max(width, 6.0), height), layout="constrained")
    figure.suptitle(f"{title}\n{heading(record)}", fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def save(figure: Figure, path: Path) -> Path:
    """Write a picture whole or not at all."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=160, bbox_inches="tight")
    part.replace(path)
    return path


def series(metrics: Mapping[str, float], prefix: str) -> tuple[list[int], list[float]]:
    """Blocks (or rounds) and values of the metrics `<prefix>/<block>`."""
    found = {int(name.rpartition("/")[2]): value for name, value in metrics.items()
             if name.rpartition("/")[0] == prefix}  # fmt: skip
    return sorted(found), [found[block] for block in sorted(found)]


def class_lines(axes: Axes, metrics: Mapping[str, float], measure: str) -> None:
    """A line a class over the blocks, for those classes that are there."""
    for name in CLASSES:
        blocks, values = series(metrics, f"{measure}/{name}")
        if blocks:
            axes.plot(blocks, values, color=CLASS_COLOURS[name], marker=CLASS_MARKERS[name],
                      markersize=5, label=NAMES.get(name, name))  # fmt: skip


def over_blocks(axes: Axes, said: str, *, log: bool = False, x: str = "block") -> None:
    """Finish a panel of lines: labels, grid, whole numbers on the axis."""
    axes.set_xlabel(x)
    axes.set_ylabel(said)
    if axes.get_xscale() == "linear":
        whole(axes.xaxis)
    else:
        plain_log(axes.xaxis)
    if log:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def from_zero(axes: Axes) -> None:
    """Let the axis of values begin at 0, with room above."""
    top = float(axes.dataLim.y1)
    axes.set_ylim(0, 1.06 * top if 0 < top < float("inf") else 1.0)  # nothing drawn: 1


def whole(*axes: Axis) -> None:
    """Whole numbers on these axes: blocks, heads, rounds."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def plain_log(axis: Axis) -> None:
    """Plain numbers: even steps, 1, 2 and 5 of each decade, or decades, by how much there is."""
    low, high = axis.get_data_interval()
    ratio = high / max(low, 1e-300)
    if ratio < 4:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 50 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def heat(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    said: str,
    *,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    bar: bool = True,
) -> None:
    """A matrix as colours; diverging around 0, blank where there is no value."""
    if limits is None:
        finite = values[np.isfinite(values)]
        top = float(np.abs(finite).max()) if finite.size else 1.0
        limits = (-top if diverging else 0.0, top or 1.0)
    image = axes.imshow(values, cmap=DIVERGING if diverging else SEQUENTIAL, vmin=limits[0],
                        vmax=limits[1], aspect="auto", interpolation="nearest")  # fmt: skip
    if bar:
        figure.colorbar(image, ax=axes, label=said, fraction=0.05, pad=0.02)


def class_matrix(
    figure: Figure, axes: Axes, values: np.ndarray, said: str, *, diverging: bool = False
) -> None:
    """A matrix of classes with its numbers, without classes that are not there."""
    there = [i for i in range(len(CLASSES)) if np.isfinite(values[i]).any()]
    values = values[np.ix_(there, there)]
    heat(figure, axes, values, said, diverging=diverging)
    names = [NAMES.get(CLASSES[i], CLASSES[i]) for i in there]
    axes.set_xticks(range(len(there)), names)
    axes.set_yticks(range(len(there)), names)
    for tick, i in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], there * 2, strict=True):
        tick.set_color(CLASS_COLOURS[CLASSES[i]])
    top = float(np.nanmax(np.abs(values))) or 1.0
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        # Both ends of the diverging map are dark, and the low end of the other one.
        dark = abs(value) > 0.6 * top if diverging else value < 0.6 * top
        said = f"{value:.2g}" if abs(value) > 1e-3 * top else "\u2248 0"  # else they overlap
        axes.text(column, row, said, ha="center", va="center", fontsize=9,
                  color="white" if dark else "black")  # fmt: skip


def class_legend(figure: Figure, names: Iterable[str], *, squares: bool = False) -> None:
    """One legend of token classes for the whole figure, below the panels."""
    handles = []
    for name in names:
        style = {"marker": "s" if squares else CLASS_MARKERS[name], "markersize": 6,
                 "linestyle": "none" if squares else "-"}  # fmt: skip
        label = NAMES.get(name, name)
        handles.append(Line2D([], [], color=CLASS_COLOURS[name], label=label, **style))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )


def there(metrics: Mapping[str, float], measure: str) -> Sequence[str]:
    """The classes that a measure has values of."""
    return [name for name in CLASSES if series(metrics, f"{measure}/{name}")[0]]
