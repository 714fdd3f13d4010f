"""What a benchmark shows: a table, the growth with tokens, a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fna_lab.report.figure import COLOURS, MARKERS

MORE = (
    ("selection_ms", "selection ms", "{:.2f}"),
    ("speedup", "against exact", "{:.2f}x"),
    ("mask_cost", "mask costs", "{:+.1%}"),
    ("coverage", "coverage radius", "{:.3f}"),
    ("against_quickfps", "against torch-quickfps", "{:.1f}x"),
    ("peak_mib", "peak MiB", "{:.1f}"),
    ("amdahl", "of Amdahl limit", "{:.1%}"),
)


def slopes(rows: list[dict[str, Any]], least: int = 4000) -> dict[str, dict[str, float]]:
    """Exponent of growth with tokens, fitted to at least two sizes from `least` tokens on."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{_label(row)}, batch {row['batch']}, {row['dtype']}"
        alike = ("variant", "mask", "batch", "dtype")
        same = [r for r in rows if all(r.get(k) == row.get(k) for k in alike)]
        same = [r for r in same if r["tokens"] >= least]
        if name in found or len({r["tokens"] for r in same}) < 2:
            continue
        x = torch.tensor([math.log(r["tokens"]) for r in same])
        found[name] = {}
        for key in ("ms", "peak_mib"):
            if all(r.get(key, 0) > 0 for r in same):
                y = torch.tensor([math.log(r[key]) for r in same])
                x0 = x - x.mean()
                found[name][key] = float((x0 * (y - y.mean())).sum() / x0.square().sum())
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("tokens", "batch", "dtype", "variant", "median ms", "quartiles"):
        table.add_column(title, justify="left" if title in ("dtype", "variant") else "right")
    more = [m for m in MORE if any(row.get(m[0]) for row in rows)]
    for _, title, _ in more:
        table.add_column(title, justify="right")
    last = None
    for row in rows:
        case = (row["tokens"], row["batch"], row["dtype"])
        if last not in (None, case):
            table.add_section()
        last = case
        said = [str(row["tokens"]), str(row["batch"]), row["dtype"], _label(row)]
        said += [f"{row['ms']:.2f}", f"{row['low_ms']:.2f}-{row['high_ms']:.2f}"]
        table.add_row(*said, *(f.format(row[key]) if row.get(key) else "" for key, _, f in more))
    console.print(table)
    for name, fit in slopes(rows).items():
        said = ", ".join(
            f"{'time' if k == 'ms' else 'memory'} ~ n^{v:.2f}" for k, v in fit.items()
        )
        console.print(f"  {name}: {said} (from 4,000 tokens on)", highlight=False)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw latency, and memory where measured, against tokens, for the first batch and dtype."""
    keys = [("ms", "latency (ms)")]
    keys += [("peak_mib", "peak memory (MiB)")] if "peak_mib" in rows[0] else []
    figure = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    first = rows[0]
    rows = [r for r in rows if (r["batch"], r["dtype"]) == (first["batch"], first["dtype"])]
    names = list(dict.fromkeys(_label(row) for row in rows))
    for axes, (key, label) in zip(
        figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True
    ):
        for i, name in enumerate(names):
            points = [(r["tokens"], r[key]) for r in rows if _label(r) == name]
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 4}
            style["linestyle"] = "-" if i < 7 else "--"
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}, batch {first['batch']}, {first['dtype']}", fontsize=10)
    figure.savefig(path, dpi=160)


def _label(row: dict[str, Any]) -> str:
    return f"{row['variant']} {row['mask']}" if "mask" in row else row["variant"]
