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
    points: Tensor, num: int, first: Tensor, allowed: Tensor | None, repeats: int | None
) -> Tensor:
    """Farthest points with the rules of `fna_lab.ops.farthest_points`, which checks arguments.

    Args:
        points: float32 `[b n c]`.
        num: how many to take, `first` included.
        first: points to take first, long `[b g]`, at least one and at most `num`.
        allowed: bool `[b n]`, False = never taken; None = all.
        repeats: a promise that at most so many of `first` repeat another one; None = no promise.

    Returns:
        Indices, long `[b num]`.
    """
    # Only known, allowed points can be taken in one go: others give way one after the other.
    together = repeats is not None and allowed is None
    return _farthest_points(points, first, allowed, num, repeats or 0, together)


@torch.library.custom_op("fna_lab::farthest_points", mutates_args=())
def _farthest_points(
    points: Tensor, first: Tensor, allowed: Tensor | None, num: int, repeats: int, together: bool
) -> Tensor:
    batch, size, channels = points.shape
    given = first.shape[1]
    points = points.mT.contiguous()  # tokens side by side: neighbouring threads read neighbours
    first = first.contiguous()
    picks = first[:, :1].repeat(1, num)
    count = first.new_zeros(batch)
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
            take_given[grid](
                points, first, best, picks, count, size, channels, given, num,
                SLOTS=slots, BLOCK_N=256, BLOCK_C=block_c, num_warps=8,
            )  # fmt: skip
            steps, given = num - given + repeats, 0
        else:
            steps = num
        if size <= MOST_IN_ONE:
            block_n, block_c, resident, warps = picture_blocks(size, channels)
            sample_picture[(batch,)](
                points, best, first, picks, count, size, channels, given, num,
                BLOCK_N=block_n, BLOCK_C=block_c, RESIDENT=resident, num_warps=warps,
            )  # fmt: skip
        else:
            _in_passes(points, best, first, picks, count, given, steps)
    return picks


@_farthest_points.register_fake
def _(points, first, allowed, num, repeats, together):  # noqa: ARG001
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
    given: int,
    steps: int,
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
            peaks[old], places[old], peaks[new], places[new], first, picks, count,
            step, size, channels, given, picks.shape[1], blocks,
            START=step < 0, BLOCK_N=PASS_BLOCK, BLOCK_C=16,
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
    best,
    picks,
    count,
    size,
    channels,
    given,
    num,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Distances to the nearest given point; the given points without repeats, and their count."""
    picture = tl.program_id(0).to(tl.int64)
    points += picture * channels * size
    first += picture * given
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tokens < size
    distance = tl.full([BLOCK_N], float("inf"), tl.float32)
    for i in range(given):
        pick = tl.load(first + i)
        near = squared_distances(points, pick, tokens, there, size, channels, BLOCK_N, BLOCK_C)
        distance = tl.minimum(distance, tl.where(tokens == pick, -0.5, near))
    tl.store(best + picture * size + tokens, distance, mask=there)
    if tl.program_id(1) == 0:
        slots = tl.arange(0, SLOTS)
        every = tl.load(first + slots, mask=slots < given, other=-1)
        taken = 0
        for i in range(given):
            pick = tl.load(first + i)
            repeated = tl.max(((every == pick) & (slots < i)).to(tl.int32), 0)
            tl.store(picks + picture * num + taken, pick, mask=repeated == 0)
            taken += 1 - repeated
        tl.store(count + picture, taken)


@triton.jit
def sample_picture(
    points,
    best,
    first,
    picks,
    count,
    size,
    channels,
    given,
    num,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """All picks of one picture: given points where they are free, then the farthest."""
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
        if i < given:
            wish = tl.load(first + picture * given + i).to(tl.int32)
            free = tl.max(tl.where(tokens == wish, distance, -2.0), 0) >= 0
            pick = tl.where(free, wish, pick)
        tl.store(picks + picture * num + i, pick.to(tl.int64))
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
    step,
    size,
    channels,
    given,
    num,
    blocks,
    START: tl.constexpr,
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
        if step < given:
            wish = tl.load(first + picture * given + step).to(tl.int32)
            inside = (wish >= 0) & (wish < size)
            free = tl.load(old + picture * size + wish, mask=inside, other=-2.0) >= 0
            pick = tl.where(free, wish, pick)
        slot = tl.load(count + picture) + step
        tl.store(picks + picture * num + slot, pick.to(tl.int64), mask=(block == 0) & (slot < num))
        near = squared_distances(points, pick, tokens, there, size, channels, BLOCK_N, BLOCK_C)
        distance = tl.minimum(distance, tl.where(tokens == pick, -0.5, near))
        tl.store(new + picture * size + tokens, distance, mask=there)
    here = tl.argmax(distance, 0, tie_break_left=True)
    tl.store(next_peaks + picture * blocks + block, tl.max(distance, 0))
    tl.store(next_places + picture * blocks + block, block * BLOCK_N + here)
