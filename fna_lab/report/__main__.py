"""Tables and figures of runs that are on disk.

python -m fna_lab.report outputs/default/multirun_...
python -m fna_lab.report outputs/... --figure out.png --x attn.num_landmarks --y patch_cosine
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fna_lab.report import figure, record, table


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
    args = parser.parse_args()
    records = [record.read(folder) for folder in record.finished(args.folder)]
    if not records:
        sys.exit(f"error: {args.folder} holds no finished run (no {record.METRICS} below it).")
    console = table.make_console()
    if len(records) == 1:
        table.show(records[0], console)
    else:
        table.show_sweep(records, console)
    if args.figure:
        try:
            figure.plot(records, args.figure, x=args.x, y=args.y, lines=args.lines)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"wrote {args.figure}")


if __name__ == "__main__":
    main()
