"""Landmark samplers alone: their time, and how well what they take covers the points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.backbone.named import named_sampler
from fna_lab.backbone.timm import TimmBackbone
from fna_lab.bench import packages
from fna_lab.bench.attention import nearly_square
from fna_lab.bench.progress import Say, follow
from fna_lab.bench.settings import Settings
from fna_lab.metric import cost

SAMPLERS = ("grid_fps", "fps", "fps:block=32", "kmeans", "grid", "random", "segment", "leverage")


def bench_selection(
    settings: Settings, say: Say, own: tuple[str, LandmarkSampler] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of every sampler on every set of points, case by case.

    `coverage` is the radius of what it takes (largest distance of a point to the nearest one
    taken, in all dimensions) in radii of exact farthest points that begin with CLS; the mean over
    pictures. `farthest` is the share of picks that exact farthest points take, too. All samplers
    get the same layer-normed points, and normalising them is in no time; a projection is in the
    time of the sampler that has one.

    Args:
        settings: what is measured.
        say: is told what is left out, and why.
        own: name and sampler with settings of its own, beside those that are named.

    Raises:
        ValueError: a name does not exist, its package is not installed, or there are more
            landmarks than points.
    """
    samplers = [*_samplers(settings, say), *([own] if own else [])]
    cases = _model_inputs(settings) if settings.model else _synthetic_inputs(settings)
    fewest, num = min(x.shape[1] for _, x, _ in cases), settings.landmarks
    if num > fewest:
        raise ValueError(
            f"{settings.named('landmarks', num)}: more landmarks than the {fewest} points."
        )
    for case, x, grid in follow(list(cases), "selection", settings):
        normed = F.layer_norm(x, x.shape[-1:])
        runs = {name: _run(make, normed, grid, num) for name, make in samplers}
        with torch.no_grad():
            times = cost.latency(
                {name: (run, None) for name, run in runs.items()},
                settings.device,
                seconds=settings.seconds,
                rounds=settings.rounds,
                least=settings.least,
            )
            farthest = ops.farthest_points(normed, num)
            exact = ops.coverage_radius(normed, farthest)
            for name, run in runs.items():
                found, picks = times[name], run()
                row = case | {"variant": name, "rounds": found["rounds"]}
                row |= {"ms": 1e3 * found["total"]}
                row |= {"low_ms": 1e3 * found["low"], "high_ms": 1e3 * found["high"]}
                row["coverage"] = float((ops.coverage_radius(normed, picks) / exact).mean())
                same = (picks[:, :, None] == farthest[:, None]).any(2)
                row["farthest"] = float(same.double().mean())
                if "torch-quickfps" in times:
                    row["against_quickfps"] = cost.ratio(times, "torch-quickfps", name)
                yield row


def _samplers(settings: Settings, say: Say) -> list[tuple[str, Any]]:
    """(name, sampler) of those asked for, else of the default ones and of what is installed."""
    names = list(settings.samplers or SAMPLERS)
    if settings.samplers is None:
        for name in packages.SAMPLERS:
            if packages.installed(name):
                names.append(name)
            else:
                say(f"{name} is not installed (the extra `bench` holds it)")
    return [(name, _sampler(name, settings.named("samplers", name))) for name in names]


def _sampler(name: str, said: str) -> LandmarkSampler | packages.Sampler:
    """The sampler of `fps` or `fps:block=8,sketch=64`, or that of a public package."""
    if name in packages.SAMPLERS:
        if not packages.installed(name):
            raise ValueError(f"{said}: not installed; the extra `bench` holds it.")
        return packages.sampler(name)
    found = named_sampler(name, said, packages.SAMPLERS)
    if found.reads == "attention":
        raise ValueError(f"{said}: it samples by attention, and here are points alone.")
    return found


def _run(sampler: Any, points: Tensor, grid: tuple[int, int], num: int) -> Callable[[], Tensor]:
    if not isinstance(sampler, LandmarkSampler):
        return lambda: sampler(points, num)
    cls = torch.zeros((points.shape[0], 1), dtype=torch.long, device=points.device)
    return lambda: sampler(
        points, num, guaranteed=cls, allowed=None, num_prefix_tokens=1, grid=grid
    )


Case = tuple[dict[str, Any], Tensor, tuple[int, int]]


def _synthetic_inputs(settings: Settings) -> list[Case]:
    """Constructed points: smooth fields over the grid with a little noise. No features."""
    found = []
    for batch in settings.batch:
        for tokens in sorted(settings.tokens):
            grid = nearly_square(tokens - 1)
            generator = torch.Generator().manual_seed(0)
            channels = settings.heads * settings.head_dim
            coarse = torch.randn(batch, channels, 9, 9, generator=generator)
            field = F.interpolate(coarse, size=grid, mode="bicubic").flatten(2).mT
            noise = torch.randn(batch, tokens, channels, generator=generator)
            x = 0.5 * noise
            x[:, 1:] += field
            case = {"points": "synthetic", "tokens": tokens, "batch": batch, "dtype": "float32"}
            found.append((case, x.to(settings.device), grid))
    return found


def _model_inputs(settings: Settings) -> list[Case]:
    """The input of one block of a ViT on the photographs of the package."""
    assert settings.model is not None
    found = []
    for side in settings.img_size:
        backbone = TimmBackbone(
            name=settings.model,
            pretrained=settings.checkpoint is None,
            checkpoint=settings.checkpoint,
            img_size=side,
        ).eval()
        if not 0 <= settings.block < backbone.depth:
            raise ValueError(
                f"{settings.named('block', settings.block)}: expected a block from 0 to "
                f"{backbone.depth - 1}."
            )
        pictures = []
        for photo in sorted(files("fna_lab.data.pictures").iterdir(), key=lambda p: p.name):
            if photo.name.endswith(".jpg"):
                with as_file(photo) as path, Image.open(path) as picture:
                    pictures.append(backbone.transform(picture.convert("RGB")))
        seen: list[Tensor] = []

        def note(module: Any, inputs: tuple[Tensor, ...], to: list[Tensor] = seen) -> None:  # noqa: ARG001
            to.append(inputs[0])

        hook = backbone.blocks[settings.block].register_forward_pre_hook(note)
        with torch.no_grad():
            backbone(torch.stack(pictures))
        hook.remove()
        for batch in settings.batch:
            x = seen[0][:batch].contiguous().to(settings.device)
            case = {"points": f"block {settings.block}", "tokens": x.shape[1], "batch": len(x)}
            found.append((case | {"dtype": "float32"}, x, backbone.grid))
    return found
