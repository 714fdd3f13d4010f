"""Figures of token anatomy, one for every measure, from a run's record and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fna_lab.report import canvas, drawings, token_maps
from fna_lab.report import topology as landscape
from fna_lab.report.figure import COLOURS
from fna_lab.report.record import samples

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


def draw(record: Record, arrays: Arrays, folder: Path) -> list[Path]:
    """Draw every figure whose measure was taken: `<name>.png` in `folder`."""
    measures = {name.split("/")[0] for name in record["metrics"] if name.count("/") == 2}
    wanted = {
        "norms": ("norms", norms),
        "mass": ("mass", mass),
        "incoming": ("incoming", incoming),
        "sink_rate": ("sink_rate", sink_rate),
        "alignment": ("qk", alignment),
        "suppression": ("suppression", suppression),
        "growth": ("growth", token_maps.growth),
        "decay": ("decay", decay),
    }
    drawn = [
        canvas.save(make(record, arrays), folder / f"{name}.png")
        for name, (measure, make) in wanted.items()
        if measure in measures
    ]
    if "map_pixels" in arrays:
        drawn.append(canvas.save(token_maps.tokens(record, arrays), folder / "tokens.png"))
    if "map_pca_final" in arrays:
        drawn.append(canvas.save(token_maps.components(record, arrays), folder / "pca.png"))
    if "map_patterns" in arrays:
        drawn.append(canvas.save(drawings.patterns(record, arrays), folder / "patterns.png"))
    if "map_picks_own" in arrays:
        drawn.append(canvas.save(drawings.landmarks(record, arrays), folder / "landmarks.png"))
    if "map_ncut" in arrays:
        drawn.append(canvas.save(landscape.topology(record, arrays), folder / "topology.png"))
    return drawn


def norms(record: Record, arrays: Arrays) -> Any:
    """Norms and largest activations by block and class."""
    metrics, detect = record["metrics"], int(arrays["detect"])
    figure, ((left, right),) = canvas.sheet(
        record, f"Norms and largest activations by token class (as at block {detect})", 1, 2
    )
    canvas.class_lines(left, metrics, "norms")
    canvas.over_blocks(left, "mean norm at the block's input", log=True)
    canvas.class_lines(right, metrics, "activations")
    blocks, values = canvas.series(metrics, "activations/median")
    right.plot(blocks, values, color="black", linestyle=":", label="median of all")
    canvas.over_blocks(right, "largest |activation|", log=True)
    right.legend(handles=right.lines[-1:], frameon=False)
    for axes in (left, right):
        axes.axvline(detect, color="grey", linewidth=0.8, linestyle="--")
    canvas.class_legend(figure, canvas.there(metrics, "norms"))
    return figure


def mass(record: Record, arrays: Arrays) -> Any:
    """Who attends to whom: shares of attention by class."""
    metrics, detect = record["metrics"], int(arrays["detect"])
    figure, panels = canvas.sheet(record, "Attention mass by token class", 1, 2)
    left, right = panels[0]
    share = arrays["mass"]  # [layers k]
    for i, name in enumerate(canvas.CLASSES):
        left.bar(range(len(share)), share[:, i], bottom=share[:, :i].sum(1), width=0.85,
                 color=canvas.CLASS_COLOURS[name])  # fmt: skip
    canvas.over_blocks(left, "share of all attention")
    left.set_ylim(0, 1)
    left.grid(visible=False)
    left.set_title("drawn by all tokens of the class", fontsize=9)
    canvas.class_matrix(figure, right, arrays["flow"][detect], "share of the query's attention")
    right.set_title(f"from class to class, block {detect}", fontsize=9)
    right.set_xlabel("to keys of class")
    right.set_ylabel("from queries of class")
    canvas.class_legend(figure, canvas.there(metrics, "mass"))
    return figure


def incoming(record: Record, arrays: Arrays) -> Any:
    """Incoming attention by block, and against what CLS alone says of it."""
    metrics, detect = record["metrics"], int(arrays["detect"])
    figure, ((left, right),) = canvas.sheet(record, "Incoming attention by token class", 1, 2)
    canvas.class_lines(left, metrics, "incoming")
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    canvas.over_blocks(left, "drawn by a token, in uniform shares", log=True)
    drawn, row = arrays["map_incoming"][detect], arrays["map_cls_row"][detect]
    classes = arrays["map_classes"]
    if (classes[:, 0] == 0).all():
        ratio = row / row[:, :1]
        for i, name in enumerate(canvas.CLASSES[1:], 1):
            member = classes == i
            right.scatter(drawn[member], ratio[member], s=14 if name != "normal" else 4,
                          color=canvas.CLASS_COLOURS[name], marker=canvas.CLASS_MARKERS[name],
                          linewidths=0, zorder=2 + (name != "normal"))  # fmt: skip
        for level, said in ((0.3, "massive"), (1.0, "sink")):
            right.axhline(level, color="grey", linewidth=0.8, linestyle="--")
            right.annotate(f"{said}: {level:g}", (1, level), xycoords=("axes fraction", "data"),
                           ha="right", va="bottom", fontsize=8)  # fmt: skip
        right.set_xscale("log")
        canvas.over_blocks(right, "a[CLS, t] / a[CLS, CLS]", log=True, x="share of all attention")
        right.set_title(f"block {detect}, {len(classes)} {samples(record)}", fontsize=9)
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no CLS to compare with", ha="center", transform=right.transAxes)
    canvas.class_legend(figure, canvas.there(metrics, "incoming"))
    return figure


def sink_rate(record: Record, arrays: Arrays) -> Any:
    """How often each head has a sink, by what the sink is, and how strong it is."""
    rates, shares = arrays["sink_heads"], arrays["sink_shares"]  # [layers heads 3]
    kinds = [i for i in range(3) if np.isfinite(rates[..., i]).any()]
    epsilon = record["config"]["task"]["epsilon"]
    figure, panels = canvas.sheet(
        record, "Attention sinks by head", 2, len(kinds), size=(4.2, 3.0), sharey=True
    )
    top = float(np.nanmax(shares))
    for column, kind in enumerate(kinds):
        last = column == len(kinds) - 1
        for axes, values, said, limit in (
            (panels[0, column], rates, f"{samples(record)} with a share > {epsilon:g}", 1.0),
            (panels[1, column], shares, "mean largest share", top),
        ):
            canvas.heat(figure, axes, values[..., kind], said, limits=(0, limit), bar=last)
            canvas.whole(axes.xaxis, axes.yaxis)
        panels[0, column].set_title(("CLS", "registers", "patch tokens")[kind], fontsize=9)
        panels[1, column].set_xlabel("head")
    for axes in panels[:, 0]:
        axes.set_ylabel("block")
    return figure


def suppression(record: Record, arrays: Arrays) -> Any:
    """Who pushes whom along its own direction, without and with attention weights."""
    detect = int(arrays["detect"])
    figure, ((matrix, heads), (plain, weighted)) = canvas.sheet(
        record, f"Suppression at block {detect}: negative = the key shrinks the query", 2, 2
    )
    values, tokens = arrays["map_matrix"], arrays["map_matrix_tokens"]
    top = float(np.quantile(np.abs(values), 0.995)) or 1.0
    canvas.heat(figure, matrix, values, "push, heads summed", diverging=True, limits=(-top, top))
    said = f"first {samples(record)[:-1]}, {len(tokens)} tokens ordered by class"
    matrix.set_title(said, fontsize=9)
    matrix.set_xlabel("pushing token (key)", labelpad=10)
    matrix.set_ylabel("pushed token (query)", labelpad=10)
    classes = arrays["map_classes"][0][tokens]
    for start, stop, name in _runs(classes):
        colour = canvas.CLASS_COLOURS[name]
        ends, place = (start, stop), (-0.02, -0.02)
        style = {"color": colour, "linewidth": 4, "solid_capstyle": "butt", "clip_on": False}
        matrix.plot(ends, place, transform=matrix.get_xaxis_transform(), **style)
        matrix.plot(place, ends, transform=matrix.get_yaxis_transform(), **style)
    matrix.set_xticks([])
    matrix.set_yticks([])
    # The whole push that a patch token receives, by head: what heads there are for.
    by_head = np.nansum(arrays["suppression_weighted"], axis=-1)[..., -1]  # [layers heads]
    canvas.heat(figure, heads, by_head, "push on a normal token", diverging=True)
    heads.set_title("with attention weights, by head", fontsize=9)
    heads.set_xlabel("head")
    heads.set_ylabel("block")
    canvas.whole(heads.xaxis, heads.yaxis)
    for axes, name, said, title in (
        (plain, "suppression", "mean push of a pair", "without attention weights"),
        (weighted, "suppression_weighted", "push of the class", "with attention weights"),
    ):
        canvas.class_matrix(figure, axes, arrays[name][detect].sum(0), said, diverging=True)
        axes.set_title(f"{title}, heads summed", fontsize=9)
        axes.set_xlabel("pushing class (key)")
        axes.set_ylabel("pushed class (query)")
    names = [name for _, _, name in _runs(classes)]
    canvas.class_legend(figure, names)
    return figure


def _runs(classes: np.ndarray) -> list[tuple[float, float, str]]:
    """Where each class begins and ends in an ordered list of tokens."""
    places = {i: np.flatnonzero(classes == i) for i in np.unique(classes)}
    return [
        (float(at[0]) - 0.5, float(at[-1]) + 0.5, canvas.CLASSES[i]) for i, at in places.items()
    ]


def alignment(record: Record, arrays: Arrays) -> Any:
    """Directions of queries and keys, and of what tokens send."""
    metrics, detect = record["metrics"], int(arrays["detect"])
    figure, panels = canvas.sheet(record, "Alignment by token class", 1, 3, size=(3.6, 3.3))
    left, middle, right = panels[0]
    for axes, measure, said in (
        (left, "qk", "cos(mean query, key)"),
        (middle, "ov", "cos($W_o v_j$, $x_j$)"),
    ):
        canvas.class_lines(axes, metrics, measure)
        axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
        canvas.over_blocks(axes, said)
    left.set_title("QK, heads averaged", fontsize=9)
    middle.set_title("OV, own direction", fontsize=9)
    canvas.class_matrix(
        figure, right, arrays["ov"][detect], "cos($x_i$, $W_o v_j$)", diverging=True
    )
    right.set_title(f"OV at block {detect}", fontsize=9)
    right.set_xlabel("sender j of class")
    right.set_ylabel("receiver i of class")
    canvas.class_legend(figure, canvas.there(metrics, "qk"))
    return figure


def decay(record: Record, arrays: Arrays) -> Any:
    """Sinks and norms round by round, under masking and two ways of sinking."""
    metrics, detect = record["metrics"], int(arrays["detect"])
    number = arrays["map_pixels"].shape[0]
    title = f"Sinks taken out one a round, seen at block {detect} "
    title += f"(first {number} {samples(record)})"
    figure, panels = canvas.sheet(record, title, 1, 3, size=(3.6, 3.3))
    branches = {"mask": "masked", "type1": "sunk, Type I", "type2": "sunk, Type II"}
    for axes, fact, said in zip(
        panels[0],
        ("top_sink", "norm_largest", "norm_removed"),
        ("strongest sink (share of attention)", "largest norm left (medians)",
         "norm of removed tokens (medians)"),
        strict=True,
    ):  # fmt: skip
        for i, (branch, label) in enumerate(branches.items()):
            rounds, values = canvas.series(metrics, f"decay/{fact}_{branch}")
            axes.plot(rounds, values, color=COLOURS[(0, 1, 2)[i]], marker="os^"[i], markersize=5,
                      linestyle=("-", "--", ":")[i], label=label)  # fmt: skip
        canvas.over_blocks(axes, said, x="round (one more token out in each)")
        canvas.from_zero(axes)
    lines = panels[0][0].lines
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure
