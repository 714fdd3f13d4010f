"""How fast every variant is against the fused exact kernel, in one interleaved run.

    python -m fna_lab.bench                           # attention alone, 197 to 16,385 tokens
    python -m fna_lab.bench --model vit_small_patch14_dinov2 --img-size 518 1036 --layers 6-11

Every round runs every variant once, so that a noisy machine treats them alike; medians over rounds
with their quartiles, selection of landmarks inside the total. Inputs are random numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.layers import parse_layers
from fna_lab.attn.stopwatch import Stopwatch
from fna_lab.backbone.named import named_attention
from fna_lab.backbone.patch import Patch, patch
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.metric import cost
from fna_lab.report.figure import COLOURS, MARKERS
from fna_lab.report.record import surroundings
from fna_lab.report.table import make_console

VARIANTS = ("exact", "fna", "fna_paper", "subset", "nystromformer", "linformer_pool", "performer")


class Call:
    """One attention on fixed random inputs, with a stopwatch around it.

    Args:
        variant: what attends.
        tokens: number of tokens, one of them CLS.
        shape: batch, heads and head dim.
        dtype: of the inputs.
        device: of the inputs.
    """

    def __init__(
        self,
        variant: AttentionVariant,
        tokens: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        batch, heads, dim = shape
        generator = torch.Generator().manual_seed(0)
        size = (batch, tokens, 4, heads, dim)
        draw = torch.randn(size, generator=generator).to(device, dtype)
        # As a host makes them: views of one projection, tokens before heads.
        self.qkv = [draw[:, :, i].transpose(1, 2) for i in range(3)]
        self.x = draw[:, :, 3].flatten(2)
        self.variant = variant
        self.grid = _grid(tokens - 1)
        self.stopwatch: Stopwatch | None = None

    def __call__(self) -> Tensor:
        """Attend once."""
        watch = self.stopwatch
        context = Context(
            layer=0,
            nth=0,
            scale=self.qkv[0].shape[-1] ** -0.5,
            x=self.x,
            num_prefix_tokens=1,
            has_cls=True,
            grid=self.grid,
            stopwatch=watch,
        )
        begin = watch.now() if watch else 0.0
        q, k, v = self.qkv
        out = self.variant(q, k, v, context)
        if watch:
            watch.note("attention", begin)
        return out


class Free(AttentionVariant):
    """No attention at all: values pass. What is left of a model's time is its Amdahl limit."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """The values themselves."""
        return v


def bench_attention(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows of one attention call, for every number of tokens, batch, dtype and variant."""
    rows = []
    cases = [(n, b, t) for t in args.dtype for b in args.batch for n in sorted(args.tokens)]
    for tokens, batch, kind in track(cases, "attention", console=console):
        calls = {}
        for name in args.variants:
            if name == "exact" and tokens > args.exact_limit:
                continue
            variant = _variant(name, args.landmarks)
            if variant.min_tokens <= tokens:
                shape = (batch, args.heads, args.head_dim)
                calls[name] = Call(variant, tokens, shape, getattr(torch, kind), args.device)
        rows += _measure(
            {name: (call, call) for name, call in calls.items()},
            {"tokens": tokens, "batch": batch, "dtype": kind},
            args,
        )
    return rows


def bench_model(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows of a whole forward pass; `amdahl` is the share of the limit that is reached."""
    rows = []
    cases = [(side, b, t) for t in args.dtype for b in args.batch for side in args.img_size]
    for side, batch, kind in track(cases, args.model, console=console):
        backbone = TimmBackbone(name=args.model, pretrained=False, img_size=side)
        backbone = backbone.to(args.device, getattr(torch, kind))
        pictures = torch.randn(
            batch, 3, side, side, device=args.device, dtype=getattr(torch, kind)
        )
        layers = parse_layers(args.layers, backbone.depth, setting="--layers")
        patches: dict[str, Patch] = {}
        for name in ("exact", *(n for n in args.variants if n != "exact"), "free"):
            variant = Free() if name == "free" else _variant(name, args.landmarks)
            patches[name] = patch(backbone.host, variant, layers=layers)

        def run(chosen: Patch, all_of: dict[str, Patch], model: Any, x: Tensor) -> None:
            for one in all_of.values():
                one.enabled = one is chosen
            model(x)

        runs: dict[str, tuple[Callable[[], object], Any]] = {
            name: (lambda p=p, a=patches, m=backbone, x=pictures: run(p, a, m, x), p)
            for name, p in patches.items()
        }
        found = _measure(
            runs,
            {"tokens": backbone.num_tokens, "img_size": side, "batch": batch, "dtype": kind},
            args,
        )
        free = next(row["ms"] for row in found if row["variant"] == "free")
        rows += [row | {"amdahl": free / row["ms"]} for row in found]
    return rows


def _measure(
    runs: dict[str, tuple[Callable[[], object], Any]],
    case: dict[str, Any],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    with torch.no_grad():
        times = cost.latency(
            runs, args.device, seconds=args.seconds, rounds=args.rounds, least=args.least
        )
        rows = []
        for name, (run, _) in runs.items():
            found = times[name]
            row = case | {"variant": name, "rounds": found["rounds"]}
            row |= {"ms": 1e3 * found["total"], "selection_ms": 1e3 * found["selection"]}
            row |= {"low_ms": 1e3 * found["low"], "high_ms": 1e3 * found["high"]}
            if "exact" in times:
                row["speedup"] = times["exact"]["total"] / found["total"]
            if args.memory:
                row["peak_mib"] = cost.peak_memory(run, args.device) / 2**20
            rows.append(row)
    return rows


def slopes(rows: list[dict[str, Any]], least: int = 4000) -> dict[str, dict[str, float]]:
    """Exponent of growth with tokens, fitted to at least two sizes from `least` tokens on."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row['variant']}, batch {row['batch']}, {row['dtype']}"
        same = [r for r in rows if all(r[k] == row[k] for k in ("variant", "batch", "dtype"))]
        same = [r for r in same if r["tokens"] >= least]
        if name in found or len({r["tokens"] for r in same}) < 2:
            continue
        x = torch.tensor([math.log(r["tokens"]) for r in same])
        found[name] = {}
        for key in ("ms", "peak_mib"):
            if all(r.get(key, 0) > 0 for r in same):
                y = torch.tensor([math.log(r[key]) for r in same])
                x0 = x - x.mean()
                found[name][key] = float((x0 * (y - y.mean())).sum() / x0.square().sum())
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("tokens", "batch", "dtype", "variant", "median ms", "quartiles", "selection ms"):
        table.add_column(title, justify="left" if title in ("dtype", "variant") else "right")
    more = [("speedup", "against exact", "{:.2f}x"), ("peak_mib", "peak MiB", "{:.1f}")]
    more += [("amdahl", "of Amdahl limit", "{:.1%}")]
    more = [m for m in more if any(m[0] in row for row in rows)]
    for _, title, _ in more:
        table.add_column(title, justify="right")
    last = None
    for row in rows:
        case = (row["tokens"], row["batch"], row["dtype"])
        if last not in (None, case):
            table.add_section()
        last = case
        said = [str(row["tokens"]), str(row["batch"]), row["dtype"], row["variant"]]
        said += [f"{row['ms']:.2f}", f"{row['low_ms']:.2f}-{row['high_ms']:.2f}"]
        said += [f"{row['selection_ms']:.2f}" if row["selection_ms"] else ""]
        table.add_row(*said, *(f.format(row[key]) if key in row else "" for key, _, f in more))
    console.print(table)
    for name, fit in slopes(rows).items():
        said = ", ".join(
            f"{'time' if k == 'ms' else 'memory'} ~ n^{v:.2f}" for k, v in fit.items()
        )
        console.print(f"  {name}: {said} (from 4,000 tokens on)", highlight=False)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw latency, and memory where measured, against tokens."""
    keys = [("ms", "latency (ms)")]
    keys += [("peak_mib", "peak memory (MiB)")] if "peak_mib" in rows[0] else []
    figure = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    first = rows[0]
    rows = [r for r in rows if (r["batch"], r["dtype"]) == (first["batch"], first["dtype"])]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, (key, label) in zip(
        figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True
    ):
        for i, name in enumerate(names):
            points = [(r["tokens"], r[key]) for r in rows if r["variant"] == name]
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}, batch {first['batch']}, {first['dtype']}", fontsize=10)
    figure.savefig(path, dpi=160)


def _variant(name: str, landmarks: int) -> AttentionVariant:
    settings = {} if name in ("exact", "performer", "tome") else {"num_landmarks": landmarks}
    return named_attention(name, **settings)


def _grid(patches: int) -> tuple[int, int]:
    """The most nearly square grid of so many patches."""
    rows = math.isqrt(patches)
    while patches % rows:
        rows -= 1
    return rows, patches // rows


def main() -> None:
    """Read the command line, measure, show and save."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m fna_lab.bench", description=__doc__, formatter_class=form
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[197, 1370, 4097, 16385])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--landmarks", type=int, default=64)
    parser.add_argument("--exact-limit", type=int, default=20000, help="most tokens of exact")
    parser.add_argument("--model", help="a timm ViT: time whole forward passes instead")
    parser.add_argument("--img-size", nargs="+", type=int, default=[518])
    parser.add_argument("--layers", default="6-", help="blocks that are replaced, with --model")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds of a case")
    parser.add_argument("--least", type=int, default=3, help="fewest rounds of a case")
    parser.add_argument("--seconds", type=float, default=10, help="time of a case, about")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", type=torch.device, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for JSON and plot")
    args = parser.parse_args()
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = make_console()
    try:
        rows = (bench_model if args.model else bench_attention)(args, console)
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(rows, console)
    out = args.out or Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S")
    out.mkdir(parents=True, exist_ok=True)
    arguments = {key: str(value) for key, value in vars(args).items()}
    facts = {"arguments": arguments, **surroundings(args.device), "slopes": slopes(rows)}
    (out / "bench.json").write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    title = args.model or f"attention, {args.heads} heads of {args.head_dim}"
    plot(rows, out / "bench.png", f"{title}, {args.landmarks} landmarks")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
