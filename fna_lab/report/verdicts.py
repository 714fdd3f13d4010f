"""Verdicts on findings, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fna_lab.report.record import samples

WORDS = {True: ("holds", "green"), False: ("does not hold", "red"), None: ("open", "yellow")}


def verdicts(record: Mapping[str, Any]) -> Group:
    """One block of text a finding: the claim, the verdict, its numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", justify="right")
    table.add_column("published finding and what is measured here")
    table.add_column("verdict", no_wrap=True)
    for found in record["findings"]:
        word, colour = WORDS[found["holds"]]
        text = Text(f"{found['claim']}\n", style="bold")
        text.append(found["says"], style="not bold")
        table.add_row(str(found["number"]), text, Text(word, style=f"bold {colour}"))
        table.add_row("", "", "")
    tokens, some = record["massive_tokens"], samples(record)
    said = "Massive: what the CLS proxy finds at 0.3, if that is at most half of the patches: "
    said += f"{tokens['mean']:.2f} tokens a {some[:-1]}"
    said += f" in {tokens['with_some']} of {tokens['pictures']} {some}"
    if tokens["norm_medians"] is not None:
        said += f"; their norm is {tokens['norm_medians']:.3g} medians"
    return Group(table, Text(f"{said}.", style="italic"))
