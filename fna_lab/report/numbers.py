"""Metrics as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def number(value: float | None) -> str:
    """A metric as people read it."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def ends(names: Iterable[str]) -> set[str]:
    """What the ends of the metrics' intervals are called, where they have one."""
    return {f"{name}_{end}" for name in names for end in ("low", "high")}
