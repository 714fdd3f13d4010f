"""Results that name two things each, as tables of one against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

TITLES = {
    "iou": "IoU of the tokens found, over all pictures",
    "precision": "share of the row's tokens that the column finds, too",
    "spearman": "rank correlation of the scores, mean over pictures",
    "stable_iou": "stability: IoU of the tokens found before and after a change of the picture",
    "stable_spearman": "stability: rank correlation of the scores before and after",
}
ASIDE = ("recall",)  # precision with rows and columns exchanged


def matrices(metrics: Mapping[str, float]) -> list[Text | Table]:
    """Tables of the metrics whose names have three parts, `<measure>/<row>/<column>`.

    Args:
        metrics: of a run.

    Returns:
        A heading and a table each: how many tokens were found, where the metrics tell
        (`found/<detector>`); and every measure, in the order of the metrics; `-` where a pair has
        no number.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] not in ASIDE and not parts[2].isdigit():
            found.setdefault(parts[0], {})[parts[1], parts[2]] = value
    if not found:
        return []
    counts = {name[6:]: value for name, value in metrics.items() if name.startswith("found/")}
    tables: list[Text | Table] = []
    if counts:
        cells = {("tokens a picture", name): value for name, value in counts.items()}
        tables += [Text("tokens found by each detector"), _matrix(cells, list(counts))]
    for measure, cells in found.items():
        columns = list(counts) or list(dict.fromkeys(column for _, column in cells))
        # A title of the table would be folded to its width.
        title = Text(TITLES.get(measure, measure.replace("_", " ")))
        tables += [title, _matrix(cells, columns)]
    return tables


def _matrix(cells: Mapping[tuple[str, str], float], columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", "\n"), justify="right", overflow="fold")
    rows = list(dict.fromkeys(row for row, _ in cells))
    # A detector that finds nothing has no numbers, and its row all the same.
    for row in columns if set(rows) <= set(columns) else rows:
        said = (cells.get((row, column)) for column in columns)
        table.add_row(row, *("-" if value is None else f"{value:.2f}" for value in said))
    return table
