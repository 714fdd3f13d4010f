"""Tables and figures of runs that are on disk.

python -m fna_lab.report outputs/default/multirun_...
python -m fna_lab.report outputs/... --figure out.png --x attn.num_landmarks --y patch_cosine
python -m fna_lab.report outputs/default/... --figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fna_lab.report import figure, figures, record, sweep, table


def main() -> None:
    """Read the command line; show what is there."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m fna_lab.report", description=__doc__, formatter_class=form
    )
    parser.add_argument("folder", type=Path, help="folder of a run, a multirun or many")
    parser.add_argument("--figure", type=Path, help="write a picture: .png, .svg or .pdf")
    parser.add_argument("--x", default="attn.num_landmarks", help="numeric setting on the axis")
    parser.add_argument("--y", nargs="+", default=["patch_cosine"], help="metrics, a panel each")
    parser.add_argument("--lines", default="attn", help="setting that makes a line")
    parser.add_argument("--figures", action="store_true", help="draw each run's own figures again")
    args = parser.parse_args()
    folders = record.finished(args.folder)
    records = [record.read(folder) for folder in folders]
    if not records:
        sys.exit(f"error: {args.folder} holds no finished run (no {record.METRICS} below it).")
    console = table.console_for(records)
    if len(records) == 1:
        table.show(records[0], console)
    else:
        sweep.show_sweep(records, console)
    if args.figure:
        try:
            figure.plot(records, args.figure, x=args.x, y=args.y, lines=args.lines)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"wrote {args.figure}")
    if args.figures:
        drawn = [path for folder in folders for path in figures.draw(folder)]
        if not drawn:
            sys.exit(f"error: no run of {args.folder} left data for figures of its own.")
        print("\n".join(f"wrote {path}" for path in drawn))


if __name__ == "__main__":
    main()
