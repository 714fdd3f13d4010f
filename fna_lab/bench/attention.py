"""One attention call of every variant on random inputs, with and without masks."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fna_lab.attn
from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context, Removal
from fna_lab.attn.stopwatch import Stopwatch
from fna_lab.backbone.named import named_attention
from fna_lab.bench import packages
from fna_lab.bench.progress import Say, follow
from fna_lab.bench.settings import Settings
from fna_lab.metric import cost


class Call:
    """One attention on fixed random inputs, with a stopwatch around it.

    Args:
        variant: what attends.
        tokens: number of tokens, one of them CLS.
        shape: batch, heads and head dim.
        dtype: of the inputs.
        device: of the inputs.
        removal: what a mask takes away, as (pattern, stage, number of tokens); None = nothing.
    """

    def __init__(
        self,
        variant: AttentionVariant,
        tokens: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        removal: tuple[str, str, int] | None = None,
    ) -> None:
        self.qkv, self.x = random_inputs(tokens, shape, dtype, device)
        self.variant = variant
        self.grid = nearly_square(tokens - 1)
        self.removal = None if removal is None else self._remove(*removal)
        self.stopwatch: Stopwatch | None = None

    def _remove(self, pattern: str, stage: str, num: int) -> Removal:
        batch, tokens, _ = self.x.shape
        generator = torch.Generator().manual_seed(1)
        places = torch.rand(batch, tokens - 1, generator=generator).argsort(1)
        gone = torch.zeros(batch, tokens, dtype=torch.bool)
        gone.scatter_(1, places[:, :num] + 1, True)  # CLS stays
        gone = gone.to(self.x.device)
        return Removal(gone, pattern, stage, *ops.token_rows(gone))

    def __call__(self) -> Tensor:
        """Attend once."""
        context = Context(
            layer=0,
            nth=0,
            scale=self.qkv[0].shape[-1] ** -0.5,
            x=self.x,
            num_prefix_tokens=1,
            has_cls=True,
            grid=self.grid,
            removal=self.removal,
            stopwatch=self.stopwatch,
        )
        with context.timed("attention"):
            return self.variant(*self.qkv, context)


def random_inputs(
    tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys, values `[b h n d]` and a block's input `[b n c]`."""
    batch, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    size = (batch, tokens, 4, heads, dim)
    draw = torch.randn(size, generator=generator).to(device, dtype)
    # As a host makes them: views of one projection, tokens before heads.
    q, k, v = (draw[:, :, i].transpose(1, 2) for i in range(3))
    return (q, k, v), draw[:, :, 3].flatten(2)


def bench_attention(
    settings: Settings, say: Say, own: AttentionVariant | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of one attention call, for every number of tokens, batch, dtype, variant and mask.

    They come case by case, so that nobody who stops loses what was measured.

    Args:
        settings: what is measured.
        say: is told what is left out, and why.
        own: a variant with settings of its own, beside those that are named.

    Raises:
        ValueError: a name does not exist, or its package is not installed.
    """
    rows: list[dict[str, Any]] = []
    names = chosen_variants(settings, say)
    variants = made_variants(names, settings, say)
    names = [name for name in names if name in variants or name in packages.ATTENTION]
    if own is not None:
        names = [*names, f"attn={own.name}"]
        variants[names[-1]] = own
    for name, variant in variants.items():
        missed = [mask for mask in settings.masks if mask.split("-")[0] not in variant.patterns]
        if missed:
            say(f"{name} is measured without {', '.join(missed)}, which it does not honour")
    sizes = sorted(settings.tokens)
    cases = [(n, b, t) for t in settings.dtype for b in settings.batch for n in sizes]
    for tokens, batch, kind in follow(cases, "attention", settings):
        case = {"tokens": tokens, "batch": batch, "dtype": kind}
        runs = {}
        for name in names:
            least = variants[name].min_tokens if name in variants else settings.landmarks
            seconds = _expected(rows, case, name, variants.get(name), settings)
            why = None
            if name == "exact" and tokens > settings.exact_limit:
                why = settings.named("exact_limit", settings.exact_limit)
            elif seconds > settings.slowest:
                limit = settings.named("slowest", settings.slowest)
                why = f"a call would take about {seconds:.0f} s, and {limit}"
            elif tokens < least:
                why = f"it needs {least}"
            else:
                try:
                    calls = _calls(name, variants.get(name), case, settings)
                    with torch.no_grad():
                        for run, _ in calls.values():
                            run()
                    runs |= calls
                except Exception as error:  # one that needs more of a host than one call shows
                    why = str(error)
            if why is not None:
                say(f"{name} is left out at {tokens} tokens: {why}")
        found = measure(runs, case, settings)
        rows += found
        yield from found


def chosen_variants(settings: Settings, say: Say) -> list[str]:
    """Names of variants: those asked for, else all that there are and what is installed.

    Raises:
        ValueError: a name does not exist, or its package is not installed.
    """
    stems = sorted(p.stem for p in Path(fna_lab.attn.__file__).parent.glob("*.py"))
    known = [stem for stem in stems if stem not in ("__init__", "base") and _is_variant(stem)]
    absent = [name for name in packages.ATTENTION if not packages.installed(name)]
    there = [name for name in packages.ATTENTION if name not in absent]
    names = settings.variants
    if names is None or list(names) == ["all"]:
        for name in absent:
            say(f"{name} is not installed (the extra `bench` holds it)")
        return ["exact", *(name for name in known if name != "exact"), *there]
    for name in names:
        said = settings.named("variants", name)
        if name in absent:
            raise ValueError(f"{said}: not installed; the extra `bench` holds it.")
        if name not in (*known, *there):
            choice = ", ".join([*known, *packages.ATTENTION])
            raise ValueError(f"{said}: there is no such variant; known: {choice}, all.")
    return list(names)


def _is_variant(stem: str) -> bool:
    """Whether a file of `fna_lab.attn` holds a variant, and no part that variants share."""
    module = importlib.import_module(f"fna_lab.attn.{stem}")
    own = (cls for _, cls in inspect.getmembers(module, inspect.isclass))
    own = (cls for cls in own if cls.__module__ == module.__name__ and not inspect.isabstract(cls))
    return any(issubclass(cls, AttentionVariant) for cls in own)


def made_variants(
    names: Sequence[str], settings: Settings, say: Say
) -> dict[str, AttentionVariant]:
    """Those of the names that are variants, with so many landmarks where they have that setting.

    Raises:
        ValueError: one that was asked for cannot have so many; of all, it is left out.
    """
    found: dict[str, AttentionVariant] = {}
    for name in (name for name in names if name not in packages.ATTENTION):
        try:
            found[name] = _named_variant(name, settings.landmarks)
        except ValueError as error:
            said = f"{settings.named('landmarks', settings.landmarks)}: {error}"
            if name in (settings.variants or ()):
                raise ValueError(said) from None
            say(f"{name} is left out: {said}")
    return found


def _named_variant(name: str, landmarks: int) -> AttentionVariant:
    try:
        return named_attention(name, num_landmarks=landmarks)
    except ValueError as error:
        if "unexpected keyword" not in str(error):
            raise
        return named_attention(name)


def _calls(
    name: str, variant: AttentionVariant | None, case: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """Runs of one variant, or of a public package: without a mask, then with each."""
    shape = (case["batch"], settings.heads, settings.head_dim)
    inputs = (case["tokens"], shape, getattr(torch, case["dtype"]), settings.device)
    if variant is None:
        qkv, _ = random_inputs(*inputs)
        return {name: (packages.nystrom_attention(qkv, settings.landmarks), None)}
    calls = {name: Call(variant, *inputs)}
    for mask in settings.masks:
        pattern, stage = mask.split("-")
        if pattern in variant.patterns:
            removal = (pattern, stage, settings.masked_tokens)
            calls[f"{name} {mask}"] = Call(variant, *inputs, removal)
    return {label: (call, call) for label, call in calls.items()}


def measure(
    runs: dict[str, tuple[Callable[[], object], Any]],
    case: dict[str, Any],
    settings: Settings,
) -> list[dict[str, Any]]:
    """Rows of a case; a label of two words is a variant under a mask.

    `amdahl` is the share of the limit that is reached, where the variant `free` runs along.
    """
    with torch.no_grad():
        times = cost.latency(
            runs,
            settings.device,
            seconds=settings.seconds,
            rounds=settings.rounds,
            least=settings.least,
        )
        rows = []
        for label, (run, _) in runs.items():
            found = times[label]
            name, _, mask = label.partition(" ")
            row = case | {"variant": name, "rounds": found["rounds"]}
            row |= {"ms": 1e3 * found["total"], "selection_ms": 1e3 * found.get("selection", 0.0)}
            row |= {"low_ms": 1e3 * found["low"], "high_ms": 1e3 * found["high"]}
            if mask:
                row |= {"mask": mask, "mask_cost": cost.ratio(times, label, name) - 1}
            if "exact" in times:
                row["speedup"] = cost.ratio(times, "exact", label)
            if "free" in times:
                row["amdahl"] = cost.ratio(times, "free", label)
            if settings.memory:
                row["peak_mib"] = cost.peak_memory(run, settings.device) / 2**20
            rows.append(row)
    return rows


def _expected(
    rows: list[dict[str, Any]],
    case: dict[str, Any],
    name: str,
    variant: AttentionVariant | None,
    settings: Settings,
) -> float:
    """Seconds of a call, should it grow with its FLOPs from the last size on; 0 = nobody knows."""
    same = ("batch", "dtype")
    known = [r for r in rows if r["variant"] == name and all(r[k] == case[k] for k in same)]
    if not known:
        return 0.0
    last, now = known[-1]["tokens"], case["tokens"]
    growth = (now / last) ** 2  # of a package, which tells no FLOPs
    if variant is not None:
        heads, dim = settings.heads, settings.head_dim
        flops = partial(variant.flops, heads=heads, head_dim=dim, channels=heads * dim, layers=1)
        growth = flops(now) / flops(last)
    return known[-1]["ms"] / 1e3 * growth


def nearly_square(patches: int) -> tuple[int, int]:
    """The most nearly square grid of so many patches."""
    rows = math.isqrt(patches)
    while patches % rows:
        rows -= 1
    return rows, patches // rows
