"""Uncertainty of means over pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float


def bootstrap_mean(
    values: Tensor, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean; of differences, it is the paired one.

    Args:
        values: one number a picture, `[n]`.
        level: of the interval, 0 to 1.
        draws: resamples.
        seed: of the draws.

    Returns:
        Lower and upper end; of a single value, that value twice.

    Raises:
        TypeError: `values` is not a floating tensor.
        ValueError: `values` is not `[n]` or empty, or the level is out of range.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    check_float("values", values, 1, "[n]")
    if len(values) == 0:
        raise ValueError("Expected values to hold at least one number, got none.")
    if not 0 < level < 1:
        raise ValueError(f"Expected level between 0 and 1, got {level!r}.")
    values = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    ends = values.new_tensor([(1 - level) / 2, (1 + level) / 2])
    means = torch.cat(
        [
            values[torch.randint(len(values), (part, len(values)), generator=generator)].mean(1)
            for part in _parts(draws, max(1, 4_000_000 // len(values)))
        ]
    )
    low, high = means.quantile(ends).tolist()
    return low, high


def _parts(total: int, most: int) -> list[int]:
    """`total` cut into parts of at most `most`, so that memory stays bounded."""
    return [most] * (total // most) + ([total % most] if total % most else [])
