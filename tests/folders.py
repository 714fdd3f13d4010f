"""Which files of a folder of variants are variants."""

from __future__ import annotations

from pathlib import Path

# Parts that the variants of a folder share.
SHARED = {
    "__init__",
    "base",
    "classes",
    "closely",
    "guard",
    "host_mask",
    "layers",
    "neurons",
    "reduced",
    "shapes_world",
    "stopwatch",
}


def variants_in(folder: Path) -> set[str]:
    """Names of the variants of a folder: its files, but for those that they share."""
    return {path.stem for path in folder.glob("*.py")} - SHARED
