"""What a benchmark tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from fna_lab.bench.settings import Settings

Say = Callable[[str], None]
Case = TypeVar("Case")


def follow(cases: Sequence[Case], said: str, settings: Settings) -> Iterable[Case]:
    """The cases one by one, under a bar that is drawn between them.

    A bar that draws itself has a thread, which would take time from what is measured.
    """
    console = Console(stderr=True)
    return track(cases, said, console=console, auto_refresh=False, disable=not settings.progress)
