"""How close generated pictures, and the steps towards them, stay to those of the exact model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.metric.fidelity import cosine, relative_errors

Made = TypeVar("Made")
SAME_DB = 100.0


def closeness(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, and ||found - exact|| / ||exact||, of each of a batch: `[b ...]` -> `[b]` twice."""
    same = cosine(found.flatten(1), exact.flatten(1))
    return same, relative_errors([exact], [found])[:, 0]


def psnr(found: Tensor, exact: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures with values from 0 to 1.

    Args:
        found: `[b ...]`.
        exact: the same of the exact model.

    Returns:
        `[b]`, float64; at most 100, which is also what equal pictures have.
    """
    error = (found.double() - exact.double()).flatten(1).square().mean(1)
    return -10 * error.clamp_min(10 ** (-SAME_DB / 10)).log10()


def with_interval(name: str, values: list[float]) -> dict[str, float]:
    """A mean over pictures, and where there are two or more its bootstrap interval (95 %)."""
    numbers = torch.tensor(values, dtype=torch.double)
    found = {name: numbers.mean().item()}
    if len(values) > 1:
        found[f"{name}_low"], found[f"{name}_high"] = ops.bootstrap_mean(numbers)
    return found


def timed(run: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What a run gives, and its seconds, with the device synchronised."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = now()
    made = run()
    return made, now() - begin
