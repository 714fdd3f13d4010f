"""Farthest point sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index
from fna_lab.ops.kernels.switch import on_cpu, use_kernels
from fna_lab.ops.spread import BARRED, TAKEN, gather_rows, reduced_points, starting_points

AT_A_TIME = 2**20  # differences in one go on a CPU: more fall out of its caches


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

    Ties go to the lowest index. Nothing is copied to the host. Kernels do it, in Triton on CUDA
    and in C++ on processors; see `fna_lab.ops.kernels.switch`, also for what keeps to torch.

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
    if start is not None:
        if first is not None:
            raise ValueError("Expected start or first, got both.")
        if start.shape != points.shape[:1]:
            raise ValueError(
                f"Expected start to have shape ({len(points)},), got {tuple(start.shape)}."
            )
        first = start[:, None]
    first = starting_points(points, num, first, allowed)
    points = reduced_points(points, sketch)
    if points.dtype == torch.float32 and use_kernels(points):
        from fna_lab.ops.kernels.points import farthest_points as on_chip

        return on_chip(points, num, first, allowed, None, in_place=False)
    if on_cpu(points.shape[1], points):
        from fna_lab.ops.kernels import compiled

        return compiled.farthest_points(points, num, first, allowed)
    return _sample(_Distance(points), num, first, allowed)


class _Distance:
    """Squared distances by differences: equal points are at 0 exactly, so that ties are ties."""

    def __init__(self, points: Tensor) -> None:
        self.points = points.detach()
        self.runs: Sequence[Tensor] = ()
        if torch.compiler.is_compiling() or points.device.type != "cpu":
            return
        if points.numel() > AT_A_TIME // 8:  # for fewer, a buffer costs more than it saves
            rows = AT_A_TIME // max(1, points[:, 0].numel())
            self.runs = self.points.split(max(1, rows), dim=1)
            self.room = torch.empty_like(self.runs[0])

    def __call__(self, picks: Tensor) -> Tensor:
        """To one point of each set: long `[b]` -> `[b n]`."""
        index = picks[:, None, None].expand(-1, 1, self.points.shape[2])
        pick = self.points.gather(1, index)
        if not self.runs:
            return torch.linalg.vector_norm(self.points - pick, dim=-1).square()
        found = torch.empty_like(self.points[..., 0])
        for run, part in zip(self.runs, found.split(self.room.shape[1], dim=1), strict=True):
            apart = torch.sub(run, pick, out=self.room[:, : run.shape[1]])
            torch.linalg.vector_norm(apart, dim=-1, out=part)
        return found.square_()


def _sample(near: _Distance, num: int, first: Tensor, allowed: Tensor | None) -> Tensor:
    picks = first.new_empty((first.shape[0], num))
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
        # Taken points rank below their twins and above what is not allowed: no needless repeats.
        closer = near(given).scatter_(1, given[:, None], TAKEN)
        if distance is None:
            distance = closer if allowed is None else closer.masked_fill_(~allowed, BARRED)
        else:
            torch.minimum(distance, closer, out=distance)
    return picks


def coverage_radius(points: Tensor, picks: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Largest distance of a point to the nearest one that was picked.

    Args:
        points: `[b n c]`.
        picks: indices, long `[b m]`; repeats change nothing.
        allowed: bool `[b n]`, False = the point need not be covered; None = all must.

    Returns:
        Euclidean, `[b]`, float32 at least.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("points", points, 3, "[b n c]")
    check_index("picks", picks, "[b m]", below=points.shape[1])
    if len(picks) != len(points):
        raise ValueError(f"Expected picks of {len(points)} pictures, got {len(picks)}.")
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    taken = gather_rows(points, picks)
    distance = torch.cdist(points, taken).amin(2)
    if allowed is not None:
        check_bool("allowed", allowed, points.shape[:2])
        distance = distance.masked_fill(~allowed, 0.0)
    return distance.amax(1)
