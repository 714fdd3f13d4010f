"""Farthest point sampling in Triton kernels.

Up to `MOST_IN_ONE` tokens one program works on each picture: all distances stay in its registers,
and the features too where they fit (`MOST_RESIDENT` numbers: 512 tokens in 64 dimensions); larger
ones are read again for every pick, from the cache. Beyond, every pick is one pass of many programs
over the picture, which leave the largest distance of their block to the next pass.

Distances are sums of squared differences in float32: equal points are at distance 0 exactly. They
may differ from those of the torch path in the last bits, and picks then where two points are as
far away up to rounding.
"""

# Kernels are functions of another language: launched by [grid], with options beside arguments.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_IN_ONE = 8192
MOST_RESIDENT = 32768
PASS_BLOCK = 1024


def farthest_points(
    points: Tensor,
    num: int,
    first: Tensor,
    allowed: Tensor | None,
    repeats: int | None,
    *,
    in_place: bool = True,
) -> Tensor:
    """Farthest points with the rules of `fna_lab.ops`, which checks arguments.

    Args:
        points: float32 `[b n c]`.
        num: how many to take, `first` included.
        first: points to take first, long `[b g]`, at least one and at most `num`.
        allowed: bool `[b n]`, False = never taken; None = all.
        repeats: a promise that at most so many of `first` repeat another one; None = no promise.
        in_place: the rules of `spread_points`: all of `first` that can be taken are taken at once
            and keep their places. Else those of `farthest_points`.

    Returns:
        Indices, long `[b num]`.
    """
    given = first.shape[1]
    together = in_place or (repeats is not None and allowed is None)
    spare = given - 1 if repeats is None else min(repeats, given)
    spare = spare if allowed is None else given
    return _farthest_points(points, first, allowed, num, spare, together, in_place)


@torch.library.custom_op("fna_lab::farthest_points", mutates_args=())
def _farthest_points(
    points: Tensor,
    first: Tensor,
    allowed: Tensor | None,
    num: int,
    spare: int,
    together: bool,
    in_place: bool,
) -> Tensor:
    batch, size, channels = points.shape
    given = first.shape[1]
    points = points.mT.contiguous()  # tokens side by side: neighbouring threads read neighbours
    first = first.contiguous()
    picks = first[:, :1].repeat(1, num)
    count = first.new_zeros(batch)
    holes = torch.empty_like(first) if in_place and spare else None
    if together:
        best = points.new_empty((batch, size))
    elif allowed is None:
        best = points.new_full((batch, size), torch.inf)
    else:
        best = points.new_full((batch, size), -1.0).masked_fill_(allowed, torch.inf)
    with torch.cuda.device_of(points):
        if together:
            block_c = min(triton.next_power_of_2(channels), 64)
            grid = (batch, triton.cdiv(size, 256))
            slots = triton.next_power_of_2(given)
            allowed = None if allowed is None else allowed.contiguous()
            take_given[grid](
                points, first, allowed, best, picks, count, holes, size, channels, given, num,
                SLOTS=slots, BLOCK_N=256, BLOCK_C=block_c, num_warps=8,
            )  # fmt: skip
            steps = min(num - given + spare, num)
        else:
            steps = num
        if size <= MOST_IN_ONE:
            block_n, block_c, resident, warps = picture_blocks(size, channels)
            sample_picture[(batch,)](
                points, best, first, picks, count, holes, size, channels, given, num,
                TAKEN=together, BLOCK_N=block_n, BLOCK_C=block_c, RESIDENT=resident,
                num_warps=warps,
            )  # fmt: skip
        else:
            _in_passes(points, best, first, picks, count, holes, steps, together)
    return picks


@_farthest_points.register_fake
def _(points, first, allowed, num, spare, together, in_place):  # noqa: ARG001
    return first.new_empty((first.shape[0], num))


def picture_blocks(size: int, channels: int) -> tuple[int, int, bool, int]:
    """Block of tokens, block of channels, whether features stay on chip, and warps."""
    block_n = max(triton.next_power_of_2(size), 16)
    block_c = triton.next_power_of_2(channels)
    if block_n * block_c <= MOST_RESIDENT:
        # So many registers a thread that nearly nothing spills (ptxas, sm_80 and sm_90).
        return block_n, block_c, True, 32 if block_n * block_c > 16384 else 8
    return block_n, max(16384 // block_n, 1), False, 16


def _in_passes(
    points: Tensor,
    best: Tensor,
    first: Tensor,
    picks: Tensor,
    count: Tensor,
    holes: Tensor | None,
    steps: int,
    together: bool,
) -> None:
    batch, channels, size = points.shape
    blocks = triton.cdiv(size, PASS_BLOCK)
    # Two of each: a pass reads what the last one left while it writes its own.
    distances = torch.empty_like(best), best
    peaks = best.new_empty((2, batch, blocks))
    places = picks.new_empty((2, batch, blocks), dtype=torch.int32)
    for step in range(-1, steps):
        new = step % 2
        old = 1 - new
        pass_over[(batch, blocks)](
            points, best if step < 0 else distances[old], distances[new],
            peaks[old], places[old], peaks[new], places[new], first, picks, count, holes,
            step, size, channels, first.shape[1], picks.shape[1], blocks,
            START=step < 0, TAKEN=together, BLOCK_N=PASS_BLOCK, BLOCK_C=16,
            BLOCKS=triton.next_power_of_2(blocks), num_warps=8,
        )  # fmt: skip


@triton.jit
def squared_distances(
    points, pick, tokens, there, size, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """To one point, features read anew: a block of tokens -> [BLOCK_N]."""
    near = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, channels, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        known = channel < channels
        centre = tl.load(points + channel * size + pick, mask=known, other=0.0)
        place = points + channel[:, None] * size + tokens[None, :]
        gap = tl.load(place, mask=known[:, None] & there[None, :], other=0.0) - centre[:, None]
        near += tl.sum(gap * gap, 0)
    return near


@triton.jit
def take_given(
    points,
    first,
    allowed,
    best,
    picks,
    count,
    holes,
    size,
    channels,
    given,
    num,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Distances to the nearest given point; the given points that can be taken, and their count.

    With `holes` they keep their places, and those of the others are noted there. `allowed` comes
    with `holes` alone.
    """
    picture = tl.program_id(0).to(tl.int64)
    points += picture * channels * size
    first += picture * given
    if allowed is not None:
        allowed += picture * size
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tokens < size
    distance = tl.full([BLOCK_N], float("inf"), tl.float32)
    for i in range(given):
        pick = tl.load(first + i)
        near = squared_distances(points, pick, tokens, there, size, channels, BLOCK_N, BLOCK_C)
        near = tl.where(tokens == pick, -0.5, near)
        if allowed is not None:
            near = tl.where(tl.load(allowed + pick) != 0, near, float("inf"))
        distance = tl.minimum(distance, near)
    if allowed is not None:
        may = tl.load(allowed + tokens, mask=there, other=0)
        distance = tl.where(may != 0, distance, -1.0)
    tl.store(best + picture * size + tokens, distance, mask=there)
    if tl.program_id(1) == 0:
        slots = tl.arange(0, SLOTS)
        every = tl.load(first + slots, mask=slots < given, other=-1)
        taken = 0
        for i in range(given):
            pick = tl.load(first + i)
            lost = tl.max(((every == pick) & (slots < i)).to(tl.int32), 0)
            if allowed is not None:
                lost = tl.where(tl.load(allowed + pick) != 0, lost, 1)
            if holes is None:
                tl.store(picks + picture * num + taken, pick, mask=lost == 0)
            else:
                tl.store(picks + picture * num + i, pick, mask=lost == 0)
                tl.store(holes + picture * given + i - taken, i, mask=lost == 1)
            taken += 1 - lost
        tl.store(count + picture, taken)


@triton.jit
def sample_picture(
    points,
    best,
    first,
    picks,
    count,
    holes,
    size,
    channels,
    given,
    num,
    TAKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """All picks of one picture: given points where they are free, then the farthest.

    `TAKEN` says that `take_given` took the given ones.
    """
    picture = tl.program_id(0).to(tl.int64)
    points += picture * channels * size
    tokens = tl.arange(0, BLOCK_N)
    there = tokens < size
    # Taken points are at -0.5, those not allowed at -1, padding below: argmax finds it never.
    distance = tl.load(best + picture * size + tokens, mask=there, other=-2.0)
    channel = tl.arange(0, BLOCK_C)
    if RESIDENT:
        known = channel < channels
        place = points + channel[:, None] * size + tokens[None, :]
        features = tl.load(place, mask=known[:, None] & there[None, :], other=0.0)
    begin = tl.load(count + picture).to(tl.int32)
    for i in range(begin, num):
        pick = tl.argmax(distance, 0, tie_break_left=True)
        if not TAKEN:
            if i < given:
                wish = tl.load(first + picture * given + i).to(tl.int32)
                free = tl.max(tl.where(tokens == wish, distance, -2.0), 0) >= 0
                pick = tl.where(free, wish, pick)
        slot = picture * num + i
        if holes is not None:
            if i < given:
                slot = picture * num + tl.load(holes + picture * given + i - begin)
        tl.store(picks + slot, pick.to(tl.int64))
        if RESIDENT:
            centre = tl.load(points + channel * size + pick, mask=known, other=0.0)
            gap = features - centre[:, None]
            near = tl.sum(gap * gap, 0)
        else:
            near = squared_distances(points, pick, tokens, there, size, channels, BLOCK_N, BLOCK_C)
        distance = tl.minimum(distance, tl.where(tokens == pick, -0.5, near))


@triton.jit(do_not_specialize=["step"])
def pass_over(
    points,
    old,
    new,
    peaks,
    places,
    next_peaks,
    next_places,
    first,
    picks,
    count,
    holes,
    step,
    size,
    channels,
    given,
    num,
    blocks,
    START: tl.constexpr,
    TAKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One pick: find it among the peaks of the last pass, then update the distances to it."""
    picture = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    points += picture * channels * size
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tokens < size
    distance = tl.load(old + picture * size + tokens, mask=there, other=-2.0)
    if not START:
        every = tl.arange(0, BLOCKS)
        peak = tl.load(peaks + picture * blocks + every, mask=every < blocks, other=-2.0)
        top = tl.argmax(peak, 0, tie_break_left=True)
        pick = tl.load(places + picture * blocks + top)
        if not TAKEN:
            if step < given:
                wish = tl.load(first + picture * given + step).to(tl.int32)
                inside = (wish >= 0) & (wish < size)
                free = tl.load(old + picture * size + wish, mask=inside, other=-2.0) >= 0
                pick = tl.where(free, wish, pick)
        slot = tl.load(count + picture) + step
        if holes is not None:
            if slot < given:
                slot = tl.load(holes + picture * given + step)
        tl.store(picks + picture * num + slot, pick.to(tl.int64), mask=(block == 0) & (slot < num))
        near = squared_distances(points, pick, tokens, there, size, channels, BLOCK_N, BLOCK_C)
        distance = tl.minimum(distance, tl.where(tokens == pick, -0.5, near))
        tl.store(new + picture * size + tokens, distance, mask=there)
    here = tl.argmax(distance, 0, tie_break_left=True)
    tl.store(next_peaks + picture * blocks + block, tl.max(distance, 0))
    tl.store(next_places + picture * blocks + block, block * BLOCK_N + here)
