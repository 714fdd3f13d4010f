"""The figures that finished runs have, drawn from what they left on disk."""

from __future__ import annotations

from pathlib import Path

from fna_lab.report import (
    anatomy_figures,
    finding_figures,
    generation_figures,
    record,
    timing_figures,
)

FOLDER = "figures"
TASKS = {
    "anatomy": anatomy_figures.draw,
    "findings": finding_figures.draw,
    "generation": generation_figures.draw,
    "timing": timing_figures.draw,
}


def draw(folder: Path) -> list[Path]:
    """Draw every figure that a finished run has data for, into `figures/` of its folder.

    Args:
        folder: of the run.

    Returns:
        The pictures, none where the run's task has no figures.
    """
    found = record.read(folder)
    arrays = record.read_arrays(folder)
    if found["task"] not in TASKS or not (arrays or "timing" in found):
        return []
    (folder / FOLDER).mkdir(exist_ok=True)
    return TASKS[found["task"]](found, arrays, folder / FOLDER)
