"""Drawings on a picture: the nine patterns on a few of its tokens, and its landmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fna_lab.report import canvas
from fna_lab.report.token_maps import ROWS, mark, on_grid, picture

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

# In the order of `fna_lab.ops.PATTERNS`, which the array has.
PATTERNS = {
    "type1": "Type I: nobody sees T",
    "type2": "Type II: only t itself sees t",
    "t_to_x": "T sees nobody (sink only)",
    "t_to_t": "T does not see T",
    "others_to_t": "the others do not see T",
    "t_self": "no t sees itself",
    "t_to_others": "each t sees itself alone",
    "x_self": "nobody sees itself",
    "x_to_x": "nobody sees anybody (sink only)",
}
GONE, LEFT = canvas.CLASS_COLOURS["massive"], "#ECECEC"
OTHER = canvas.CLASS_COLOURS["normal"]


def patterns(record: Record, arrays: Arrays) -> Figure:
    """T on the pictures, and which pairs each pattern takes away among a few of their tokens."""
    drawn, chosen = int(arrays["map_patterns_picture"]), arrays["map_patterns_tokens"]
    tokens, pixels = arrays["map_tokens"], arrays["map_pixels"]
    names = _token_names(chosen, tokens[drawn], record)
    shown = [drawn, *(i for i in range(len(pixels)) if i != drawn)][:ROWS]
    figure = Figure(figsize=(10.4, 8.2), layout="constrained")
    figure.suptitle(
        f"What nine patterns take out of attention, around T: {_of_t(record, arrays)}\n"
        f"{canvas.heading(record)}",
        fontsize=10,
    )
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.75))  # type: ignore[misc]
    for place, axes in enumerate(above.subplots(1, ROWS)):
        axes.set_axis_off()
        if place >= len(shown):
            continue
        _tokens_on(axes, pixels[shown[place]], tokens[shown[place]], record)
        number = int(tokens[shown[place]].sum())
        axes.set_title(f"{number} token{'s' * (number != 1)} in T", fontsize=9)
        if place == 0:
            _name_tokens(axes, chosen, names, record)
    panels = below.subplots(2, 5)
    mine = record["mask"].get("pattern")
    for axes, (name, said), matrix in zip(
        panels.flat, PATTERNS.items(), arrays["map_patterns"], strict=False
    ):
        _pairs(axes, matrix, names)
        axes.set_title(
            f"{name}{' (this run)' if name == mine else ''}\n{said}",
            fontsize=8.5,
            fontweight="bold" if name == mine else "normal",
        )
    for axes in panels[:, 0]:
        axes.set_ylabel("query", fontsize=9)
    for axes in [*panels[1, :4], panels[0, 4]]:
        axes.set_xlabel("key", fontsize=9)
    _explain(panels[1, 4])
    return figure


def landmarks(record: Record, arrays: Arrays) -> Figure:
    """Landmarks on the pictures, by their order: the run's own, and those of other samplers."""
    block, own = int(arrays["map_landmarks_block"].flat[0]), arrays["map_picks_own"]
    others = [name.removeprefix("map_picks_") for name in arrays if name.startswith("map_picks_")]
    # A sampler that takes the very same is the run's own.
    order = [key for key in record["config"]["task"].get("samplers", []) if key in others]
    order = [n for n in order if not np.array_equal(arrays[f"map_picks_{n}"], own)]
    names = ["own", *order]
    pixels, num = arrays["map_pixels"][:ROWS], own.shape[1]
    title = f"{num} landmarks at block {block}"
    if "map_clusters" in arrays:
        title += "; lines: borders of the clusters that the run's own stand for"
    title += "\nradius: largest distance of a token to its nearest landmark, in that of exact "
    title += "farthest points"
    figure, panels = canvas.sheet(record, title, len(pixels), len(names), size=(2.3, 2.4))
    found: set[str] = set()
    prefix = record["backbone"]["num_prefix_tokens"]
    for i, row in enumerate(panels):
        for axes, name in zip(row, names, strict=True):
            found |= mark(axes, pixels[i], arrays["map_classes"][i], record)
            if name == "own" and "map_clusters" in arrays:
                _borders(axes, on_grid(arrays["map_clusters"][i], record), record)
            picks = arrays[f"map_picks_{name}"][i]
            _dots(axes, picks, num, record)
            said = f"{len(np.unique(picks[picks >= prefix]))} on the picture"
            radius = arrays[f"map_coverage_{name}"][i]
            said += f", radius {radius:.2f}" if np.isfinite(radius) else ""
            axes.text(0.5, -0.02, said, transform=axes.transAxes, ha="center", va="top",
                      fontsize=8)  # fmt: skip
    said = str(record["config"]["attn"]["landmarks"]["_target_"]).rsplit(".", 2)[-2]
    panels[0, 0].set_title(f"attn={record['attn']['name']}: {said}", fontsize=9, weight="bold")
    for axes, name in zip(panels[0, 1:], names[1:], strict=True):
        axes.set_title(name, fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(Normalize(1, num), canvas.SEQUENTIAL), ax=list(panels[:, -1]),
        fraction=0.05, pad=0.02, label="order in which landmarks are listed",
    )  # fmt: skip
    canvas.whole(bar.ax.yaxis)
    canvas.class_legend(figure, [c for c in canvas.CLASSES if c in found], squares=True)
    return figure


def _of_t(record: Record, arrays: Arrays) -> str:
    """Which tokens T are."""
    mask = record["mask"]
    if "detector" in mask:
        return f"what {mask['detector']} ({mask['threshold']}) finds at block {mask['detect']}"
    return f"the massive tokens at block {int(arrays['detect'])}"


def _token_names(chosen: np.ndarray, tokens: np.ndarray, record: Record) -> list[str]:
    """CLS, then t1, t2, ... and x1, x2, ... for the others."""
    names, counts = [], {"t": 0, "x": 0}
    for token in chosen:
        if token < record["backbone"]["num_prefix_tokens"]:
            names.append("CLS")
            continue
        kind = "t" if tokens[token] else "x"
        counts[kind] += 1
        names.append(f"{kind}{counts[kind]}")
    return names


def _colour(name: str) -> str:
    return {"C": canvas.CLASS_COLOURS["cls"], "t": GONE, "x": OTHER}[name[0]]


def _tokens_on(axes: Axes, pixels: np.ndarray, tokens: np.ndarray, record: Record) -> None:
    """The picture, T framed."""
    grey = pixels.mean(-1, keepdims=True)
    picture(axes, ((0.5 * pixels + 0.5 * grey) * 0.7 + 255 * 0.3).astype(np.uint8))
    for (row, column), there in np.ndenumerate(on_grid(tokens, record)):
        if there:
            axes.add_patch(_frame(row, column, GONE, record))


def _name_tokens(axes: Axes, chosen: np.ndarray, names: list[str], record: Record) -> None:
    """Names beside the tokens that the matrices show."""
    backbone = record["backbone"]
    size, columns = backbone["patch_size"], on_grid(np.arange(backbone["num_tokens"]), record)
    for token, name in zip(chosen, names, strict=True):
        if name == "CLS":
            continue
        row, column = np.argwhere(columns == token)[0]
        if name[0] == "x":
            axes.add_patch(_frame(row, column, OTHER, record))
        right = column < 0.8 * columns.shape[1]
        x = (column + (1.3 if right else -0.3)) * size
        behind = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8}
        axes.text(
            x, (row + 0.5) * size, name, ha="left" if right else "right", va="center",
            fontsize=9, weight="bold", color=_colour(name), bbox=behind,
        )  # fmt: skip


def _frame(row: int, column: int, colour: str, record: Record) -> Rectangle:
    size = record["backbone"]["patch_size"]
    corner = column * size - 0.5, row * size - 0.5
    return Rectangle(corner, size, size, facecolor=(colour, 0.55), edgecolor=colour, linewidth=1.2)


def _pairs(axes: Axes, matrix: np.ndarray, names: list[str]) -> None:
    """A matrix of pairs: crossed where one is taken away."""
    axes.imshow(matrix, cmap=ListedColormap([LEFT, GONE]), vmin=0, vmax=1)
    for row, column in np.argwhere(matrix):
        axes.text(column, row, "\u00d7", ha="center", va="center", color="white", fontsize=9)
    size = len(names)
    axes.set_xticks(range(size), names, fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set_xticks(np.arange(size - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(size - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_color(_colour(label.get_text()))


def _explain(axes: Axes) -> None:
    """What the matrices show, in the place of a tenth one."""
    axes.set_axis_off()
    handles = [
        Patch(color=GONE, label="pair taken away"),
        Patch(color=LEFT, label="pair left"),
        Patch(color=(GONE, 0.55), label="t: a token of T"),
        Patch(color=(OTHER, 0.55), label="x: another token"),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    said = "mask: logits -inf before softmax,\nthe rest of the row grows\n"
    said += "sink: weights 0 after softmax,\ntheir share is lost"
    axes.text(0.04, 0.05, said, transform=axes.transAxes, fontsize=8, va="bottom")


def _dots(axes: Axes, picks: np.ndarray, num: int, record: Record) -> None:
    """Landmarks that lie on the picture, coloured by their order."""
    places = on_grid(np.arange(record["backbone"]["num_tokens"]), record)
    size = record["backbone"]["patch_size"]
    number = np.full(record["backbone"]["num_tokens"], -1)
    number[picks[::-1]] = np.arange(len(picks))[::-1]  # the first place of one that repeats
    there = np.argwhere(number[places] >= 0)
    order = number[places][tuple(there.T)] + 1
    wide = 150.0 / max(places.shape)  # points of a patch, about
    axes.scatter(
        (there[:, 1] + 0.5) * size - 0.5, (there[:, 0] + 0.5) * size - 0.5, c=order,
        cmap=canvas.SEQUENTIAL, vmin=1, vmax=num, s=min(max((0.75 * wide) ** 2, 9), 45),
        edgecolors="white", linewidths=0.7, zorder=3,
    )  # fmt: skip


def _borders(axes: Axes, clusters: np.ndarray, record: Record) -> None:
    """Lines between neighbouring patches of different clusters."""
    size = record["backbone"]["patch_size"]
    lines = [
        ((column * size, row * size), (column * size, (row + 1) * size))
        for row, column in np.argwhere(clusters[:, 1:] != clusters[:, :-1]) + (0, 1)
    ]
    lines += [
        ((column * size, row * size), ((column + 1) * size, row * size))
        for row, column in np.argwhere(clusters[1:] != clusters[:-1]) + (1, 0)
    ]
    shifted = [[(x - 0.5, y - 0.5) for x, y in line] for line in lines]
    for width, colour in ((1.3, "black"), (0.6, "white")):
        axes.add_collection(LineCollection(shifted, colors=colour, linewidths=width, zorder=2))
