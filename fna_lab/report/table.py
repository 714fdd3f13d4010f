"""A record as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fna_lab.report.errors import budget_table, error_table, fallback_text
from fna_lab.report.matrix import matrices
from fna_lab.report.numbers import ends, number
from fna_lab.report.record import counted, nature, samples
from fna_lab.report.settings import option
from fna_lab.report.timings import timings
from fna_lab.report.verdicts import verdicts

COST_ROWS = (
    ("latency", "{}_total_ms", "ms a batch"),
    ("  attention", "{}_attention_ms", "ms"),
    ("  landmark selection", "{}_selection_ms", "ms"),
    ("  everything else", "{}_rest_ms", "ms"),
    ("peak memory", "{}_peak_mib", "MiB"),
)

# What the values of a measure are, by the first part of their names.
MEASURES = {
    "norms": "norms: mean norm of a token, by class, in the host's units",
    "activations": "activations: largest of a token's channels, by class; 2nd, 3rd, median of all",
    "mass": "mass: share of all attention that goes to the class",
    "incoming": "incoming: attention that one token of the class draws, in uniform shares",
    "sink_rate": "sink rate: share of heads with a sink of that kind",
    "qk": "qk: cosine of a head's mean query with keys, by class of the key",
    "ov": "ov: cosine of what a token sends (W_o v) with its own direction, by class",
    "suppression": "suppression: push along its own direction that a token receives, by class",
    "landmarks": "landmarks: how many of each class; coverage radius (1 = of farthest points)",
    "growth": "growth: norm after a block of the token that is largest at detection, and medians",
    "velocity": "velocity: of a step against exact attention; teacher = from the same latents, "
    "free = each from its own",
    "decay": "decay: strongest sink (share), sinks left, norms (medians) as sinks are taken out",
}
COUNTED = {"decay": "round", "velocity": "step"}  # others by the block
WIDTH = 120  # of the console, where wide tables need room
COLUMNS = 10  # of one table: more would be folded


def make_console(*, wide: bool = False) -> Console:
    """Standard output; a file or pipe has no width of its own, so it gets room for wide tables.

    With `wide` a narrow terminal gets it too, and breaks the lines where rich would cut digits.
    """
    console = Console()
    fits = console.is_terminal and not (wide and console.width < WIDTH)
    return console if fits else Console(width=WIDTH)


def console_for(records: Sequence[Mapping[str, Any]]) -> Console:
    """Standard output, as wide as the tables of these runs need it."""
    return make_console(wide=any("timing" in record for record in records))


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print what was run, its metrics, and its cost against exact attention."""
    if "timing" in record:
        console.print(timings(record))
        return
    parts: list[Any] = [_heading(record)]
    parts.append(verdicts(record) if "findings" in record else _metrics(record["metrics"]))
    if record.get("budget"):
        parts.insert(1, budget_table(record["budget"]))
    if record.get("errors"):
        parts.append(error_table(record["errors"]))
    if record.get("fallbacks"):
        parts.append(fallback_text(record["fallbacks"], record["config"]["attn"]["guard"]))
    if record["cost"]:
        parts.append(_cost(record["cost"], samples(record)))
    console.print(Group(*parts))


def _heading(record: Mapping[str, Any]) -> Text:
    backbone, data, config = record["backbone"], record["data"], record["config"]
    text = Text()
    text.append(f"{record['task']}", style="bold")
    text.append(f" of {counted(record)} of {data['name']}")
    text.append(" (synthetic)\n" if data.get("synthetic") else "\n")
    text.append(f"backbone  {backbone['name']}{nature(record)}: {_size(backbone)}, ")
    text.append(f"{backbone['num_tokens']} tokens, {backbone['depth']} blocks\n")
    settings = config["attn"]
    if record.get("budget"):  # what the setting says was not used
        settings = {key: value for key, value in settings.items() if key != "num_landmarks"}
    attn = _said(settings, ("layers", "landmarks", "solver"))
    text.append(f"attn      {record['attn']['name']} in blocks {_range(record['attn']['layers'])}")
    text.append(f" ({attn})\n" if attn else "\n")
    mask = record["mask"]
    text.append(f"mask      {mask['name']}")
    if "found" in mask:
        found = mask["found"]
        text.append(f" ({mask['stage']}) in blocks {_range(mask['layers'])}; {mask['detector']} ")
        text.append(f"({mask['threshold']}) at block {mask['detect']} finds ")
        one = samples(record)[:-1]
        text.append(f"{found['mean']:.2f} tokens a {one}, in {found['share']:.0%} of them")
        if mask.get("schedule") == "iterative":
            text.append(f", in {found['rounds']:.1f} rounds")
            text.append(f" ({found['cut_short']} at their bound)" if found["cut_short"] else "")
            text.append(f"; {found['new_per_removed']:.2f} new ones arise for each taken out")
    text.append("\n")
    return text


def _metrics(metrics: Mapping[str, float]) -> Group:
    """Plain metrics, then a table for every measure that has a value a block or a round."""
    measures: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    limits = ends(metrics)
    if limits & set(metrics):
        table.add_column("95 % interval", justify="right")
    for name, value in metrics.items():
        fact, _, block = name.rpartition("/")
        if block.isdigit():
            measure, _, fact = fact.rpartition("/")
            measures.setdefault(measure, {}).setdefault(block, {})[fact] = value
        elif name != "n" and not fact and name not in limits:
            low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
            row = [name.replace("_", " "), number(value)]
            if low is not None:
                row.append(f"{number(low)} to {number(high)}")
            table.add_row(*row)
    parts = [table] if table.row_count else []
    tables = (_layers(name, layered) for name, layered in measures.items())
    return Group(*parts, *tables, *matrices(metrics))


def _layers(measure: str, layered: Mapping[str, Mapping[str, float]]) -> Group:
    """One row a block, one column a fact; in several tables where they are many."""
    every = list(dict.fromkeys(fact for row in layered.values() for fact in row))
    parts: list[Any] = [f" {MEASURES.get(measure, measure)}"] if measure else []
    count = -(-len(every) // COLUMNS)
    width = -(-len(every) // count)
    for start in range(0, len(every), width):
        facts = every[start : start + width]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column(COUNTED.get(measure, "block"), justify="right")
        for fact in facts:
            table.add_column(fact.replace("_", "\n"), justify="right", overflow="fold")
        for block, row in sorted(layered.items()):
            table.add_row(str(int(block)), *(f"{row[f]:.3g}" if f in row else "-" for f in facts))
        parts.append(table)
    return Group(*parts)


def _cost(cost: Mapping[str, Any], of: str) -> Table:
    title = f"cost, {cost['batch']} {of} a batch, median of {cost['rounds']:.0f} rounds"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("", "exact", "this run", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for label, key, unit in COST_ROWS:
        exact, found = cost[key.format("exact")], cost[key.format("patched")]
        ratio = f"{exact / found:.2f}x" if found > 0 and exact > 0 else ""
        table.add_row(f"{label} ({unit})", f"{exact:.1f}", f"{found:.1f}", ratio)
    exact, found = cost["exact_attention_gflops"], cost["attention_gflops"]
    label = f"attention of the blocks (GFLOP a {of[:-1]})"
    table.add_row(label, f"{exact:.3f}", f"{found:.3f}", f"{exact / found:.2f}x")
    even = cost["break_even_tokens"]
    text = "never" if even is None else f"{even:.0f}"
    label = f"break-even in FLOPs (tokens; {cost['tokens']} here)"
    table.add_row(label, "", text, "")
    return table


def _said(config: Mapping[str, Any], parts: Sequence[str]) -> str:
    """A variant's settings in one line; parts by the names of their files."""
    said = []
    for key, value in config.items():
        if key.startswith("_") or key == "layers" or value is None:
            continue
        if isinstance(value, Mapping) and "_target_" in value:
            said.append(f"{key} {option(value)}")
        else:
            said.append(f"{key}={value}".replace("True", "true").replace("False", "false"))
    return ", ".join(sorted(said, key=lambda text: text.split(" ")[0] not in parts))


def _range(layers: Sequence[int]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def _size(backbone: dict[str, Any]) -> str:
    if backbone.get("modality") == "text":
        return f"sentences of {backbone['max_tokens']} tokens"
    return f"{backbone['img_size']} px"
