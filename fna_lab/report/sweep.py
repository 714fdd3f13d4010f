"""Many records as a table of what differs between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fna_lab.report.numbers import ends, number
from fna_lab.report.settings import flatten
from fna_lab.report.timings import timing_table

GROUPS = ("backbone", "data", "attn", "mask")  # a column each; every task has its own tables
FOLDED = "settings unlike most"


@dataclass(frozen=True)
class _Column:
    title: str
    cells: Sequence[str]
    right: bool = False
    folded: bool = False

    @property
    def width(self) -> int:
        """Characters, with the space to the next column."""
        lines = [*self.title.split("\n"), *self.cells]
        return 3 + max(cell_len(line) for line in lines)


def show_sweep(records: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print finished runs as rows that can be compared: what differs, metrics, cost.

    Every task has tables of its own. Where columns are too many for the console, settings share
    one column of a table before, and metrics go on in further tables.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        tasks.setdefault(str(record["task"]), []).append(record)
    console.print(f"[bold]{_runs(records)}[/]")
    for task, some in tasks.items():
        title = f"{task}, {_runs(some)}" if len(tasks) > 1 else None
        if "timing" in some[0]:  # whose numbers are a table a run
            _show_timings(some, title, console)
            continue
        for table in _tables(some, console.width):
            table.title, table.title_justify = title and escape(title), "left"
            console.print(table)


def _show_timings(
    records: Sequence[Mapping[str, Any]], title: str | None, console: Console
) -> None:
    """A table of each run, below the settings that it does not share with all others."""
    if title:
        console.print(escape(title))
    configs = [flatten(record["config"]) for record in records]
    groups = _differing_groups(configs)
    shown = [*groups, *_differing(configs, groups)]
    for i, (record, config) in enumerate(zip(records, configs, strict=True)):
        said = _written({key: config[key] for key in shown if key in config})
        console.print(f"[bold]run {i}[/] {escape(said)}", highlight=False)
        console.print(timing_table(record["timing"]["rows"]))


def _tables(records: Sequence[Mapping[str, Any]], width: int) -> Iterator[Table]:
    configs = [flatten(record["config"]) for record in records]
    groups = _differing_groups(configs)
    extra = _differing(configs, groups)
    first, more = ([_settings(key, configs) for key in keys] for keys in (groups, extra))
    numbers = [*_metrics(records), *_costs(records)]
    widest = max((column.width for column in numbers), default=0)
    if sum(column.width for column in [*first, *more]) + widest > width:
        run = _Column("run", [str(i) for i in range(len(records))], True)
        common = _commonest(extra, configs)
        said = _Column(FOLDED, _unlike(common, configs), folded=True)
        table = _table([run, *(replace(column, folded=True) for column in first), said])
        table.caption = escape(f"most runs: {_written(common)}")
        table.caption_justify = "left"
        yield table
        first = [run, *first]
        if sum(column.width for column in first) + widest > width:
            first = [run]
    else:
        first += more
    room = width - sum(column.width for column in first)
    for shown in _parted(numbers, room):
        yield _table([*first, *shown])


def _table(columns: Sequence[_Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        side: Literal["left", "right"] = "right" if column.right else "left"
        title = escape(column.title)
        table.add_column(title, justify=side, no_wrap=not column.folded, overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(escape, cells))
    return table


def _parted(columns: Sequence[_Column], room: int) -> list[list[_Column]]:
    """Columns for one table after the other, each of at least one and otherwise no wider."""
    parts: list[list[_Column]] = [[]]
    for column in columns:
        if parts[-1] and sum(c.width for c in [*parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _runs(records: Sequence[object]) -> str:
    return f"{len(records)} run{'s' if len(records) != 1 else ''}"


def _settings(key: str, configs: Sequence[Mapping[str, Any]]) -> _Column:
    return _Column(key, [str(config.get(key, "-")) for config in configs])


def _commonest(keys: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The commonest value of each setting among the runs that have it."""
    return {key: Counter(c[key] for c in configs if key in c).most_common(1)[0][0] for key in keys}


def _unlike(common: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of each run that are not the common ones."""
    return [
        _written({key: c[key] for key, value in common.items() if c.get(key, value) != value})
        or "-"
        for c in configs
    ]


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _metrics(records: Sequence[Mapping[str, Any]]) -> list[_Column]:
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    aside = {"n"} | ends(names)
    names = [n for n in names if "/" not in n and "balanced" not in n and n not in aside]
    return [
        _Column(name.replace("_", "\n"), [number(r["metrics"].get(name)) for r in records], True)
        for name in names
    ]


def _costs(records: Sequence[Mapping[str, Any]]) -> list[_Column]:
    if not any(record.get("cost") for record in records):
        return []
    shown = (
        ("latency\nms", "patched_total_ms", "{:.1f}"),
        ("against\nexact", "speedup", "{:.2f}x"),
        ("attention\nGFLOP", "attention_gflops", "{:.3f}"),
    )
    return [
        _Column(title, [f.format(r["cost"][key]) if r.get("cost") else "" for r in records], True)
        for title, key, f in shown
    ]


def _differing_groups(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in GROUPS if len({config.get(key) for config in configs}) > 1]


def _differing(configs: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> list[str]:
    """Settings that differ between runs, those of a group between runs that share its option."""
    found = []
    for key in dict.fromkeys(key for config in configs for key in config):
        group = key.split(".")[0] if "." in key else ""
        if key in groups or key in ("name", "outputs", "force"):
            continue
        values: dict[Any, set[Any]] = {}
        for config in configs:
            if key in config:
                values.setdefault(config.get(group), set()).add(config[key])
        if any(len(some) > 1 for some in values.values()):
            found.append(key)
    return found
