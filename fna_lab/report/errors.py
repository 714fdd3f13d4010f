"""The error meter, the guard and the budget as tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

# Title, fact, token class (None where the fact knows none).
COLUMNS = (
    ("error\nCLS", "relative_error", "cls"),
    ("error\npatch", "relative_error", "patch"),
    ("error\ntext", "relative_error", "text"),
    ("cosine\nCLS", "cosine", "cls"),
    ("cosine\npatch", "cosine", "patch"),
    ("cosine\ntext", "cosine", "text"),
    ("row sum\noff by", "row_sum_gap", "all"),
    ("negative\nshare", "negative_share", "all"),
    ("negative\nmass", "negative_mass", "all"),
    ("condition\nof A", "log10_condition", None),
    ("residual\nI - AZ", "inverse_residual", None),
    ("residual\nof solve", "solve_residual", None),
)


def error_table(errors: Mapping[str, Mapping[str, Any]]) -> Table:
    """What the meter found: one row a block, means over heads."""
    title = "attention against exact attention on the same q, k, v; means over heads"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=title)
    table.title_justify = "left"
    table.add_column("block", justify="right")
    columns = [c for c in COLUMNS if any(_values(row, c) for row in errors.values())]
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for block, row in sorted(errors.items()):
        cells = []
        for column in columns:
            values = _values(row, column)
            mean = sum(values) / len(values) if values else math.nan
            if column[1] == "log10_condition":
                mean = 10**mean
            cells.append(f"{mean:.3g}" if values else "-")
        table.add_row(str(int(block)), *cells)
    return table


def fallback_text(fallbacks: Mapping[str, Mapping[str, int]], threshold: float) -> Text:
    """What the guard replaced, in lines."""
    total = {kind: sum(row[kind] for row in fallbacks.values()) for kind in ("ridge", "exact")}
    heads = sum(row["heads"] for row in fallbacks.values())
    text = Text(f"guard ({threshold}): of {heads} heads of pictures ")
    text.append(f"{total['ridge']} were tried again with ridge, {total['exact']} done exactly")
    where = [
        f"block {int(block)}: {row['ridge']}, {row['exact']}"
        for block, row in sorted(fallbacks.items())
        if row["ridge"] or row["exact"]
    ]
    if where:
        text.append(f" ({'; '.join(where)})")
    return text


def budget_table(solved: Mapping[str, Any]) -> Group:
    """What a budget chose, and how to ask for the same again."""
    heading = Text(
        f"budget {solved['budget']:g}: 1 - cosine of the features is at most "
        f"{solved['error']:.3g} on each of the {solved['pictures']} calibration pictures"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("block", "landmarks", "error of its\nattention"):
        table.add_column(name, justify="right")
    chosen = {int(block): num for block, num in solved["landmarks"].items()}
    errors = {int(block): error for block, error in solved["errors"].items()}
    for block in sorted(chosen):
        table.add_row(str(block), str(chosen[block]), f"{errors[block]:.3g}")
    pairs = ",".join(f"{block}:{chosen[block]}" for block in sorted(chosen))
    blocks = ",".join(str(block) for block in sorted(chosen))
    text = Text(
        f"attention of all blocks: {solved['gflops']:.3f} GFLOP a picture instead of "
        f"{solved['exact_gflops']:.3f}; {solved['checks']} choices measured end to end\n"
        f"the same again: attn.layers=[{blocks}] 'attn.num_landmarks={{{pairs}}}'\n"
    )
    return Group(heading, table, text)


def _values(row: Mapping[str, Any], column: Sequence[Any]) -> list[float]:
    _, fact, name = column
    found = row.get(fact, {} if name else [])
    return list(found.get(name, [])) if name else list(found)
