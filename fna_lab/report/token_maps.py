"""Figures that lie on the picture: tokens, norms, attention, components.

A sentence lies on a strip, one column a token in reading order; padding is left blank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fna_lab.report import canvas
from fna_lab.report.figure import COLOURS
from fna_lab.report.record import samples

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
GROWTH = {"exact": "exact", "off": "attention off", "off_no_bias": "off, no output bias"}
ROWS = 4


def tokens(record: Record, arrays: Arrays) -> Figure:
    """Where the classes lie, with norms and incoming attention at the detection block."""
    detect = int(arrays["detect"])
    pixels = arrays["map_pixels"][:ROWS]
    if (arrays["map_classes"][:, 0] == 0).all():
        rule = "massive: CLS attends to it with over 0.3 of its own weight"
    else:
        rule = "massive: draws over 2.7 uniform shares"
    figure, panels = canvas.sheet(
        record, f"Tokens by class at block {detect} ({rule})", len(pixels), 3, size=(2.7, 2.4)
    )
    found: set[str] = set()
    for i, (left, middle, right) in enumerate(panels):
        found |= mark(left, pixels[i], arrays["map_classes"][i], record)
        norm = on_grid(arrays["map_norm"][detect, i], record)
        plain(figure, middle, norm / np.nanmedian(norm), "norm (medians)")
        drawn = arrays["map_incoming"][detect, i]
        drawn = drawn * np.isfinite(drawn).sum()
        plain(figure, right, on_grid(drawn, record), "uniform shares")
    for axes, said in zip(panels[0], ("tokens", "norm", "incoming attention"), strict=True):
        axes.set_title(said, fontsize=9)
    canvas.class_legend(figure, [c for c in canvas.CLASSES if c in found], squares=True)
    return figure


def components(record: Record, arrays: Arrays) -> Figure:
    """First three components of patch tokens as red, green and blue, beside the norms."""
    detect = int(arrays["detect"])
    pixels = arrays["map_pixels"][:ROWS]
    figure, panels = canvas.sheet(
        record, "First three components of patch tokens as colours", len(pixels), 4,
        size=(2.3, 2.3),
    )  # fmt: skip
    for i, (first, second, third, fourth) in enumerate(panels):
        picture(first, pixels[i])
        picture(second, colours(arrays["map_pca_final"][i], record))
        picture(third, colours(arrays["map_pca_detect"][i], record))
        norm = on_grid(arrays["map_norm"][detect, i], record)
        plain(figure, fourth, norm / np.nanmedian(norm), "norm (medians)")
    shares = [record["metrics"].get(f"pca_explained_{k}", 0.0) for k in (1, 2, 3)]
    said = (samples(record)[:-1], f"features ({sum(shares):.0%} of variance)",
            f"input of block {detect}", f"norm, block {detect}")  # fmt: skip
    for axes, text in zip(panels[0], said, strict=True):
        axes.set_title(text, fontsize=9)
    return figure


def growth(record: Record, arrays: Arrays) -> Figure:
    """Norms with attention, without it, and without its output bias."""
    metrics, restart = record["metrics"], int(arrays["restart"])
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    figure.suptitle(
        f"Growth of norms with attention switched off from block {restart} on\n"
        f"{canvas.heading(record)}",
        fontsize=10,
    )
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))  # type: ignore[misc]
    left, right = above.subplots(1, 2)
    for i, (name, label) in enumerate(GROWTH.items()):
        style = {"color": COLOURS[(6, 1, 0)[i]], "marker": "os^"[i], "markersize": 5,
                 "label": label, "linestyle": ("-", "--", ":")[i]}  # fmt: skip
        left.plot(*canvas.series(metrics, f"growth/{name}"), **style)
        right.plot(*canvas.series(metrics, f"growth/{name}_median"), **style)
    canvas.over_blocks(left, "norm after the block")
    canvas.over_blocks(right, "median patch norm")
    detect = int(arrays["detect"])
    left.set_title(f"the patch token that is largest at block {detect}", fontsize=9)
    right.set_title("all patch tokens", fontsize=9)
    left.legend(frameon=False)
    for axes in (left, right):
        canvas.from_zero(axes)
    # The first picture's last block, on one scale.
    maps = {name: on_grid(arrays[f"map_growth_{name}"][0, -1], record) for name in GROWTH}
    top = max(float(np.nanmax(values)) for values in maps.values())
    last = restart + arrays["map_growth_exact"].shape[1] - 1
    below.suptitle(f"norms after block {last}, first {samples(record)[:-1]}", fontsize=9)
    for axes, (name, label) in zip(below.subplots(1, 4), [("", ""), *GROWTH.items()], strict=True):
        if not name:
            picture(axes, arrays["map_pixels"][0])
            continue
        image = axes.imshow(
            maps[name], cmap=canvas.SEQUENTIAL, vmin=0, vmax=top, aspect=aspect(maps[name])
        )
        axes.set_axis_off()
        axes.set_title(label, fontsize=9)
        if name == "off_no_bias":
            below.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label="norm")
    return figure


def on_grid(values: np.ndarray, record: Record) -> np.ndarray:
    """Values of all tokens or of the patch tokens `[n ...]` as `[rows columns ...]`."""
    backbone = record["backbone"]
    rows = columns = backbone["img_size"] // backbone["patch_size"]
    if backbone.get("modality") == "text":
        rows, columns = 1, backbone["num_tokens"] - backbone["num_prefix_tokens"]
    return values[len(values) - rows * columns :].reshape(rows, columns, *values.shape[1:])


def aspect(values: np.ndarray) -> Literal["auto", "equal"]:
    """Square patches; the tokens of a strip are as high as its panel."""
    return "auto" if len(values) == 1 else "equal"


def colours(scores: np.ndarray, record: Record) -> np.ndarray:
    """Three components as colours: each from its 1st to its 99th percentile."""
    there = (scores != 0).any(-1)  # padding scores nothing
    low, high = np.percentile(scores[there] if there.any() else scores, (1, 99), axis=0)
    scaled = np.clip((scores - low) / np.where(high > low, high - low, 1), 0, 1)
    scaled[~there] = 1
    if scaled.shape[1] < 3:
        scaled = np.pad(scaled, ((0, 0), (0, 3 - scaled.shape[1])))
    return on_grid(scaled, record)


def picture(axes: Axes, pixels: np.ndarray) -> None:
    """A picture without axes."""
    axes.imshow(pixels, interpolation="nearest", aspect=aspect(pixels))
    axes.set_axis_off()


def plain(figure: Figure, axes: Axes, values: np.ndarray, said: str) -> None:
    """A map over the picture, from 0 on."""
    style: dict[str, Any] = {"interpolation": "nearest", "aspect": aspect(values)}
    image = axes.imshow(values, cmap=canvas.SEQUENTIAL, vmin=0, **style)
    axes.set_axis_off()
    figure.colorbar(image, ax=axes, label=said, fraction=0.05, pad=0.02)


def mark(axes: Axes, pixels: np.ndarray, classes: np.ndarray, record: Record) -> set[str]:
    """The picture, its extreme tokens framed; the classes that it has."""
    grey = pixels.mean(-1, keepdims=True)
    picture(axes, ((0.5 * pixels + 0.5 * grey) * 0.7 + 255 * 0.3).astype(np.uint8))
    size = record["backbone"]["patch_size"]
    for (row, column), code in np.ndenumerate(on_grid(classes, record)):
        name = canvas.CLASSES[code]
        if name != "normal":
            colour = canvas.CLASS_COLOURS[name]
            corner = column * size - 0.5, row * size - 0.5
            style = {"facecolor": (colour, 0.55), "edgecolor": colour, "linewidth": 1}
            axes.add_patch(Rectangle(corner, size, size, **style))
    return {canvas.CLASSES[code] for code in np.unique(on_grid(classes, record))} - {"normal"}
