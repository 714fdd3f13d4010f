"""How fast every variant is against the fused exact kernel, in one interleaved run.

    python -m fna_lab.bench                           # every variant alone, 197 to 65,537 tokens
    python -m fna_lab.bench --batch 1 8 --dtype float32 bfloat16     # in batches, and in half
    python -m fna_lab.bench --masks --variants exact fna     # what the cheap forms of masks cost
    python -m fna_lab.bench --model vit_small_patch14_dinov2 --img-size 518 1036 --layers 6-11
    python -m fna_lab.bench --selection               # landmark samplers alone, constructed points
    python -m fna_lab.bench --selection --model vit_small_patch14_dinov2.lvd142m --checkpoint PATH

Every round runs every variant once, so that a noisy machine treats them alike; medians over
rounds with their quartiles, and of the ratios within a round; selection of landmarks inside the
total. Inputs are random numbers, the tokens that a mask takes away are random ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fna_lab.bench.attention import bench_attention
from fna_lab.bench.model import bench_model
from fna_lab.bench.selection import bench_selection
from fna_lab.bench.settings import DTYPES, MASKS, Settings
from fna_lab.report.record import surroundings, write_json
from fna_lab.report.table import make_console
from fna_lab.report.timing_figures import plot
from fna_lab.report.timings import device, slopes, timing_table

# What settings of a backbone are called here.
OPTIONS = {
    "backbone.name": "--model",
    "backbone.checkpoint": "--checkpoint",
    "backbone.img_size": "--img-size",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(
        prog="python -m fna_lab.bench",
        description=__doc__,
        formatter_class=form,
        argument_default=argparse.SUPPRESS,  # `Settings` has the defaults
    )
    add = found.add_argument
    add("--variants", nargs="+", help="of conf/attn and of public packages; default: all")
    add("--tokens", nargs="+", type=int)
    add("--batch", nargs="+", type=int)
    add("--dtype", nargs="+", choices=DTYPES)
    add("--heads", type=int)
    add("--head-dim", type=int)
    add("--landmarks", type=int)
    add("--masks", nargs="*", choices=MASKS, help="pattern and stage; bare = all")
    add("--masked-tokens", type=int, help="tokens that a mask takes away")
    add("--exact-limit", type=int, help="most tokens of exact")
    add("--slowest", type=float, help="seconds that no call may be expected to take")
    add("--model", help="a timm ViT: time whole forward passes instead")
    add("--img-size", nargs="+", type=int)
    add("--layers", help="blocks that are replaced, with --model")
    add("--selection", action="store_true", default=False, help="landmark samplers alone")
    add("--samplers", nargs="+", help="with --selection: names, or name:setting=value,...")
    add("--checkpoint", help="weights of --model, with --selection")
    add("--block", type=int, help="whose input is sampled, with --selection --model")
    add("--rounds", type=int, help="most rounds of a case")
    add("--least", type=int, help="fewest rounds of a case")
    add("--seconds", type=float, help="time of a case, about")
    add("--memory", action=argparse.BooleanOptionalAction)
    add("--device", type=_device)
    add("--out", type=Path, default=None, help="folder for JSON and plot")
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = f"{name!r} is no device that is here ({str(error).splitlines()[0]})"
        raise argparse.ArgumentTypeError(said) from None
    return device


def _in_options(said: str) -> str:
    """What a backbone says of its settings, in the words of this command line."""
    for setting, option in OPTIONS.items():
        said = said.replace(f"{setting}=", f"{option} ")
    return said


def main() -> None:
    """Read the command line, measure, save case by case, and show."""
    asked = vars(parser().parse_args())
    selection, chosen = asked.pop("selection"), asked.pop("out")
    asked.setdefault("device", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.get("masks") == []:
        asked["masks"] = MASKS
    console = make_console()
    bench = bench_model if asked.get("model") else bench_attention
    bench = bench_selection if selection else bench
    rows: list[dict[str, Any]] = []
    out = chosen or Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S")
    interrupted = False
    try:
        settings = Settings(**asked)
        settings.check_used("selection" if selection else "attention", "--model", "--selection")
        out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
        arguments = {key: str(value) for key, value in vars(settings).items()}
        arguments["selection"] = str(selection)
        facts = {"arguments": arguments, **surroundings(settings.device)}
        for row in bench(settings, lambda text: console.print(text, highlight=False)):
            rows.append(row)
            write_json(facts | {"slopes": slopes(rows), "rows": rows}, out / "bench.json")
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted; what was measured until then:")
    except (ValueError, OSError) as error:
        if chosen is None and out.is_dir() and not rows:
            out.rmdir()
        said = isinstance(error, OSError) and error.strerror  # the system's own words
        sys.exit(f"error: --out {out}: {said}" if said else f"error: {_in_options(str(error))}")
    if not rows:
        sys.exit("error: nothing was measured; see the lines above.")
    make_console(wide=True).print(timing_table(rows))
    console.print(f"  {device(facts)}", highlight=False)
    title = settings.model or f"attention, {settings.heads} heads of {settings.head_dim}"
    title = "selection" if selection else title
    plot(rows, out / "bench.png", f"{title}, {settings.landmarks} landmarks\n{device(facts)}")
    console.print(f"wrote {out}")
    if interrupted:
        sys.exit(130)  # as shells expect it


if __name__ == "__main__":
    main()
