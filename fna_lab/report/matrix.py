"""Results that name two things each, as tables of one against the other."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

TITLES = {
    "iou": "IoU of the tokens found, over all pictures",
    "precision": "share of the row's tokens that the column finds, too",
    "recall": "share of the column's tokens that the row finds, too",
    "spearman": "rank correlation of the scores, mean over pictures",
    "stable_iou": "stability: IoU of the tokens found before and after a change of the picture",
    "stable_spearman": "stability: rank correlation of the scores before and after",
}


def matrices(metrics: Mapping[str, float]) -> list[Table]:
    """Tables of the metrics whose names have three parts, `<measure>/<row>/<column>`.

    Args:
        metrics: of a run.

    Returns:
        One table a measure, in the order of the metrics; `-` where a pair has no number.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 3:
            found.setdefault(parts[0], {})[parts[1], parts[2]] = value
    counts = {name[6:]: value for name, value in metrics.items() if name.startswith("found/")}
    return [_matrix(measure, cells, counts) for measure, cells in found.items()]


def _matrix(
    measure: str, cells: Mapping[tuple[str, str], float], counts: Mapping[str, float]
) -> Table:
    title = TITLES.get(measure, measure.replace("_", " "))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    # Detectors that find nothing have no IoU, and still a row and a column.
    columns = list(counts) or sorted({pair[1] for pair in cells})
    rows = list(dict.fromkeys(pair[0] for pair in cells))
    rows = columns if set(rows) <= set(columns) else rows
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", "\n"), justify="right", overflow="fold")
    for row in rows:
        said = (cells.get((row, column)) for column in columns)
        table.add_row(row, *("-" if v is None else f"{v:.2f}" for v in said))
    if measure == "iou" and counts:
        table.add_section()
        table.add_row("tokens a picture", *(f"{counts[name]:.2f}" for name in columns))
    return table
