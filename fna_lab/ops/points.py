"""Farthest point sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index


def farthest_points(
    points: Tensor,
    num: int,
    *,
    start: Tensor | None = None,
    first: Tensor | None = None,
    allowed: Tensor | None = None,
    sketch: int | None = None,
) -> Tensor:
    """Repeatedly take the point farthest (squared Euclidean) from those already taken.

    Ties go to the lowest index. Nothing is copied to the host.

    Args:
        points: `[b n c]`.
        num: how many to take, the given ones included, 1 to n.
        start: the first point of each set, long `[b]`; None = the first allowed point.
        first: several points to take first, long `[b g]`; instead of `start`. One that was
            taken before, or is not allowed, gives way to a farthest one.
        allowed: bool `[b n]`, False = never taken. Where fewer than `num` points are allowed,
            picks repeat.
        sketch: project the points to so many random dimensions first (seed 0), which costs
            less and keeps distances on average; None = as they are.

    Returns:
        Indices, long `[b num]`, in the order of the taking.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or `start` and `first` are both given.

    Source: Gonzalez 1985; Eldar et al. 1997.
    """
    check_float("points", points, 3, "[b n c]")
    batch, size, channels = points.shape
    if isinstance(num, bool) or not isinstance(num, int) or not 1 <= num <= size:
        raise ValueError(f"Expected num to be an integer from 1 to {size}, got {num!r}.")
    if start is not None and first is not None:
        raise ValueError("Expected start or first, got both.")
    if allowed is not None:
        check_bool("allowed", allowed, (batch, size))
    if start is not None:
        if start.shape != (batch,):
            raise ValueError(f"Expected start to have shape ({batch},), got {tuple(start.shape)}.")
        first = start[:, None]
    if first is None or first.shape[1] == 0:
        first = (
            points.new_zeros((batch, 1), dtype=torch.long)
            if allowed is None
            else allowed.int().argmax(1, keepdim=True)
        )
    check_index("first", first, "[b g]")
    if first.shape[1] > num:
        raise ValueError(f"Expected first to hold at most num={num} points, got {first.shape[1]}.")
    if points.dtype in (torch.float16, torch.bfloat16):
        points = points.float()
    if sketch is not None and sketch < channels:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(channels, sketch, generator=generator).to(points)
        points = points @ draw
    return _sample(points, num, first, allowed)


def _sample(points: Tensor, num: int, first: Tensor, allowed: Tensor | None) -> Tensor:
    batch, _, channels = points.shape
    picks = first.new_empty((batch, num))
    distance: Tensor | None = None
    for i in range(num):
        if i >= first.shape[1]:
            assert distance is not None  # `first` holds at least one point
            given = distance.argmax(1)
        elif distance is not None or allowed is not None:
            # Negative where a point was taken before, or must not be.
            room = distance if distance is not None else allowed.float() - 1  # pyright: ignore
            given = first[:, i]
            free = room.gather(1, given[:, None])[:, 0] >= 0
            given = torch.where(free, given, room.argmax(1))
        else:
            given = first[:, i]
        picks[:, i] = given
        current = given[:, None, None].expand(-1, 1, channels)
        # Direct differences: equal points are at distance 0 exactly, so that ties are ties.
        near = (points - points.gather(1, current)).square_().sum(-1)
        # Taken points rank below their twins and above what is not allowed: no needless repeats.
        near.scatter_(1, given[:, None], -0.5)
        if distance is None:
            distance = near if allowed is None else near.masked_fill_(~allowed, -1.0)
        else:
            torch.minimum(distance, near, out=distance)
    return picks
