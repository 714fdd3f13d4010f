"""What a benchmark shows: a table, and the growth with tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

MORE = (
    ("selection_ms", "selection\nms", "{:.2f}"),
    ("speedup", "against\nexact", "{:.2f}x"),
    ("mask_cost", "mask\ncosts", "{:+.1%}"),
    ("coverage", "coverage\nradius", "{:.3f}"),
    ("farthest", "as farthest\npoints", "{:.0%}"),
    ("against_quickfps", "against\ntorch-quickfps", "{:.1f}x"),
    ("peak_mib", "peak\nMiB", "{:.1f}"),
    ("amdahl", "of Amdahl\nlimit", "{:.1%}"),
)
WHAT = {
    "attention": "attention alone, on random queries, keys and values (constructed)",
    "selection": "landmark selection alone, on smooth random fields (constructed)",
}
Rows = Sequence[Mapping[str, Any]]


def slopes(rows: Rows, least: int = 4000) -> dict[str, dict[str, float]]:
    """Exponent of growth with tokens, fitted to at least two sizes from `least` tokens on."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{label(row)}, batch {row['batch']}, {row['dtype']}"
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


def timings(record: Mapping[str, Any]) -> Group:
    """What a run of task=timing measured, for people."""
    facts = record["timing"]
    text = Text()
    text.append("timing", style="bold")
    text.append(f" of {WHAT[facts['part']]}\n")
    text.append(f"inputs    {inputs(facts)}; no picture is read, and {record['backbone']['name']}")
    text.append(f" is not run\ndevice    {device(record)}\n")
    notes = [Text(note, style="italic") for note in facts["notes"]]
    return Group(text, timing_table(facts["rows"]), *notes)


def timing_table(rows: Rows) -> Group:
    """The rows as a table, and the growth with tokens below it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("tokens", "batch", "dtype", "variant", "median\nms", "quartiles\nms"):
        side: Literal["left", "right"] = "left" if title in ("dtype", "variant") else "right"
        table.add_column(title, justify=side, no_wrap=True)
    more = [m for m in MORE if any(row.get(m[0]) for row in rows)]
    for _, title, _ in more:
        table.add_column(title, justify="right", no_wrap=True)
    last = None
    for row in rows:
        case = (row["tokens"], row["batch"], row["dtype"])
        if last not in (None, case):
            table.add_section()
        last = case
        said = [str(row["tokens"]), str(row["batch"]), row["dtype"], label(row)]
        said += [f"{row['ms']:.2f}", f"{row['low_ms']:.2f}-{row['high_ms']:.2f}"]
        table.add_row(*said, *(f.format(row[key]) if row.get(key) else "" for key, _, f in more))
    parts: list[Any] = [table]
    for name, fit in slopes(rows).items():
        said = ", ".join(
            f"{'time' if k == 'ms' else 'memory'} ~ n^{v:.2f}" for k, v in fit.items()
        )
        parts.append(Text(f"  {name}: {said} (from 4,000 tokens on)"))
    return Group(*parts)


def label(row: Mapping[str, Any]) -> str:
    """A variant, and the mask that it is under."""
    return f"{row['variant']} {row['mask']}" if "mask" in row else row["variant"]


def inputs(facts: Mapping[str, Any]) -> str:
    """Size of the inputs of a run."""
    heads, dim = facts["heads"], facts["head_dim"]
    size = f"{heads} heads of {dim}" if facts["part"] == "attention" else f"{heads * dim} channels"
    return f"{size}, {facts['landmarks']} landmarks"


def device(record: Mapping[str, Any]) -> str:
    """What the run ran on."""
    facts = record["device"]
    if "name" in facts:
        return facts["name"]
    threads = facts["threads"]
    said = f"{facts['type']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{said}, {facts['processor']}"
