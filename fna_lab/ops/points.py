"""Farthest point sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index
from fna_lab.ops.kernels.switch import use_kernels
from fna_lab.ops.sketch import sketch_points
from fna_lab.ops.spread import gather_rows

AT_A_TIME = 2**20  # differences in one go on a CPU: more fall out of its caches


def farthest_points(
    points: Tensor,
    num: int,
    *,
    start: Tensor | None = None,
    first: Tensor | None = None,
    allowed: Tensor | None = None,
    sketch: int | None = None,
    repeats: int | None = None,
    gram: bool = False,
) -> Tensor:
    """Repeatedly take the point farthest (squared Euclidean) from those already taken.

    Ties go to the lowest index. Nothing is copied to the host. On CUDA a Triton kernel does it,
    see `fna_lab.ops.kernels.switch`; the environment variable `FNA_LAB_TRITON=0` keeps to torch.

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
        repeats: a promise that at most so many of `first` stand in it before; it is then taken in
            one product, and a repeat gives way at the end of the list. None = no promise.
        gram: take distances as |x|^2 - 2 x p + |p|^2, which reads the points once; equal points
            are then at distance 0 up to rounding alone.

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
        points = sketch_points(points, sketch)
    if points.dtype == torch.float32 and use_kernels(points):
        from fna_lab.ops.kernels.points import farthest_points as on_chip

        return on_chip(points, num, first, allowed, repeats, in_place=False)
    near = _GramDistance(points) if gram else _DirectDistance(points)
    if repeats is None or allowed is not None:
        return _sample(near, num, first, allowed)
    return _sample_behind(near, num, first, repeats)


class _DirectDistance:
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

    def least(self, picks: Tensor) -> Tensor:
        """To the nearest of several points: long `[b g]` -> `[b n]`."""
        index = picks[..., None].expand(-1, -1, self.points.shape[2])
        mode = "donot_use_mm_for_euclid_dist"
        found = torch.cdist(self.points, self.points.gather(1, index), compute_mode=mode)
        return found.amin(2).square()


class _GramDistance:
    """Squared distances by products, without |p|^2 of one pick where all share it."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.square = points.square().sum(-1)

    def __call__(self, picks: Tensor) -> Tensor:
        """To one point of each set: long `[b]` -> `[b n]`."""
        index = picks[:, None]
        pick = self.points.gather(1, index[..., None].expand(-1, 1, self.points.shape[2]))
        own = self.square + self.square.gather(1, index)
        return torch.baddbmm(own[..., None], self.points, pick.mT, alpha=-2)[..., 0].clamp_(min=0)

    def least(self, picks: Tensor) -> Tensor:
        """To the nearest of several points: long `[b g]` -> `[b n]`."""
        index = picks[..., None].expand(-1, -1, self.points.shape[2])
        own = self.square.gather(1, picks)[:, None]
        product = torch.baddbmm(own, self.points, self.points.gather(1, index).mT, alpha=-2)
        return (product.amin(2) + self.square).clamp_(min=0)


Distance = _DirectDistance | _GramDistance


def _sample_behind(near: Distance, num: int, first: Tensor, repeats: int) -> Tensor:
    """Take `first` in one step, then farthest points; repeats fall out of the list."""
    distance = near.least(first).scatter_(1, first, -0.5)
    picks = []
    more = num - first.shape[1] + repeats
    for i in range(more):
        pick = distance.argmax(1)
        picks.append(pick)
        if i + 1 < more:
            closer = near(pick).scatter_(1, pick[:, None], -0.5)
            torch.minimum(distance, closer, out=distance)
    found = torch.cat([first, *(pick[:, None] for pick in picks)], dim=1)
    if repeats:
        again = (first[:, :, None] == first[:, None]).tril(-1).any(2)
        order = F.pad(again, (0, more)).to(torch.uint8).argsort(dim=1, stable=True)
        found = found.gather(1, order)
    return found[:, :num]


def _sample(near: Distance, num: int, first: Tensor, allowed: Tensor | None) -> Tensor:
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
        closer = near(given).scatter_(1, given[:, None], -0.5)
        if distance is None:
            distance = closer if allowed is None else closer.masked_fill_(~allowed, -1.0)
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
    check_index("picks", picks, "[b m]")
    if len(picks) != len(points):
        raise ValueError(f"Expected picks of {len(points)} pictures, got {len(picks)}.")
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    taken = gather_rows(points, picks)
    distance = torch.cdist(points, taken).amin(2)
    if allowed is not None:
        check_bool("allowed", allowed, points.shape[:2])
        distance = distance.masked_fill(~allowed, 0.0)
    return distance.amax(1)
