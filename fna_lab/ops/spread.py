"""Points that are spread out: nearly the farthest ones, in a few matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fna_lab.ops.attention import full_precision
from fna_lab.ops.checks import check_bool, check_float, check_index, check_integer
from fna_lab.ops.kernels.switch import on_cpu, use_kernels
from fna_lab.ops.sketch import sketch_points

# What stands in a list of distances for points that were taken, and that must not be.
TAKEN, BARRED = -0.5, -1.0
# Of `thin`: points of the sample for each that is taken from it; points kept for each that is
# still to take, and at least one of so many. Fewer cost coverage, more only time.
SAMPLED, KEPT, KEPT_ONE_OF = 5, 12, 8


def spread_points(
    points: Tensor,
    num: int,
    *,
    first: Tensor | None = None,
    allowed: Tensor | None = None,
    sketch: int | None = None,
    repeats: int | None = None,
    barred: int | None = None,
    block: int = 8,
    candidates: int = 128,
    thin: bool = False,
) -> Tensor:
    """Nearly `farthest_points`, several at a time and by matrix products: fast.

    A round looks at one candidate of each of many runs of neighbouring tokens, that which is
    farthest from the points already taken; and takes the `block` candidates that lie farthest
    both from those points and from every candidate that lies farther out. All points are then
    measured against what the round took in one product.

    With `thin` the points are measured once. The first half of `num` are the farthest points of
    a sample from all over the list. Only those that then lie farthest out are kept, for no other
    can become the farthest one; and the second half comes from them in rounds, whose candidates
    are the farthest of all, and which take the farthest candidate one by one. What is taken covers
    the points nearly as well as exact farthest points do; kernels in C++ take these.

    Distances are |x|^2 - 2 x p + |p|^2: equal points are at 0 up to rounding, and ties go
    anywhere. Nothing is copied to the host.

    Args:
        points: `[b n c]`.
        num: how many to take, the given ones included, 1 to n.
        first: points to take first, long `[b g]`; None = the first allowed point. One that stands
            in it before, or is not allowed, gives way to a farthest one.
        allowed: bool `[b n]`, False = never taken. Where fewer than `num` points are allowed,
            picks repeat.
        sketch: project the points to so many random dimensions first (`sketch_points`); None = as
            they are.
        repeats: a promise that at most so many of `first` stand in it before, which saves time;
            None = no promise.
        barred: a promise that at most so many points are not allowed, which saves time; None = no
            promise.
        block: most points that a round takes. 1 takes the farthest point each time, with `thin`
            too, which then leaves no point out.
        candidates: most candidates of a round.
        thin: half of a sample, half of what then lies farthest out.

    Returns:
        Indices, long `[b num]`; the given ones keep their places.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    check_float("points", points, 3, "[b n c]")
    if not 1 <= block <= candidates:
        raise ValueError(
            f"Expected 1 <= block <= candidates, got block={block}, candidates={candidates}."
        )
    first = starting_points(points, num, first, allowed)
    points = reduced_points(points.detach(), sketch)
    size, given = points.shape[1], first.shape[1]
    # Kernels take farthest points as fast as any that are nearly so.
    if points.dtype == torch.float32 and use_kernels(points):
        from fna_lab.ops.kernels.points import farthest_points as on_chip

        return on_chip(points, num, first, allowed, repeats)
    if thin and on_cpu(size, points):
        from fna_lab.ops.kernels import compiled

        return compiled.farthest_points(points, num, first, allowed, in_place=True)
    repeats = min(given - 1 if repeats is None else repeats, given, num)
    gone = 0 if allowed is None else given if barred is None else min(barred, given)
    spare = min(repeats + gone, given, num)
    if num == given and not spare:
        return first
    barred = 0 if allowed is None else size if barred is None else barred
    sure, spare = num - given + repeats, spare - repeats
    runs = min(candidates, size)
    counts = _counts(sure, spare, block, runs)
    # Enough runs hold a free point, whatever was taken before.
    plenty = size - num - repeats - spare - barred >= max(counts) * -(-size // runs)
    if not thin and on_cpu(size, points):
        from fna_lab.ops.kernels import compiled

        return compiled.spread_points(points, num, first, allowed, counts, runs, plenty)
    lost = out = None
    if gone and allowed is not None:
        lost = out = ~allowed.gather(1, first)
    if repeats:
        again = (first[:, :, None] == first[:, None]).tril(-1).any(2)
        lost = again if out is None else again | out
    square = torch.linalg.vector_norm(points, dim=-1).square_()
    if thin:
        picks = _thinned(
            points, square, first, out, allowed, barred, sure, spare, block, candidates
        )
        return _in_place(first, picks, lost, num)
    # The squared distance to the nearest point taken.
    distance = _nearest(points, square, first, out)
    if allowed is not None:
        distance.masked_fill_(~allowed, BARRED)
    # Candidates come farthest first: which of them do not lie farther out than which.
    nearer = torch.ones((runs, runs), dtype=torch.bool, device=points.device).triu_()
    picks = [first]
    for i, count in enumerate(counts):
        if i:
            torch.minimum(distance, _nearest(points, square, picks[i]), out=distance)
        took = _take(points, square, distance, nearer, count)
        if not plenty:
            took = _free(distance, took)
        picks.append(took)
    return _in_place(first, picks[1:], lost, num)


def starting_points(
    points: Tensor, num: int, first: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """The points to take first, long `[b g]` with g >= 1, once all arguments are checked."""
    batch, size, _ = points.shape
    check_integer("num", num, most=size)
    if allowed is not None:
        check_bool("allowed", allowed, (batch, size))
    if first is None or first.shape[1] == 0:
        if allowed is not None:
            return allowed.int().argmax(1, keepdim=True)
        return points.new_zeros((batch, 1), dtype=torch.long)
    check_index("first", first, "[b g]", below=size)
    if len(first) != batch:
        raise ValueError(f"Expected first to have {batch} rows, got {len(first)}.")
    if first.shape[1] > num:
        raise ValueError(f"Expected first to hold at most num={num} points, got {first.shape[1]}.")
    return first


def reduced_points(points: Tensor, sketch: int | None) -> Tensor:
    """Points in a sketch of so many dimensions, if they have more; in at least float32."""
    if sketch is not None and sketch < points.shape[2]:
        return sketch_points(points, sketch)
    return points.to(torch.promote_types(points.dtype, torch.float32))


def _counts(sure: int, spare: int, block: int, runs: int) -> list[int]:
    """How many points each round takes: equal rounds of at most `block`, then those to spare.

    What the first rounds take does not depend on how many come after: batch mates decide on that.
    """
    rounds = max(-(-sure // min(block, runs)), 1)
    counts = [sure // rounds + int(i < sure % rounds) for i in range(rounds)]
    while spare:
        more = min(spare, runs - counts[-1])
        counts[-1] += more
        spare -= more
        if spare:
            counts.append(0)
    return counts


def _in_place(first: Tensor, picks: list[Tensor], lost: Tensor | None, num: int) -> Tensor:
    """The given points and the picks, of which the last take the places of those that fell out."""
    if lost is None:
        return torch.cat([first, *picks], dim=1)
    more = picks[0] if len(picks) == 1 else torch.cat(picks, dim=1)
    own = num - first.shape[1]
    return torch.cat([_filled(first, lost, more[:, own:]), more[:, :own]], dim=1)


def _filled(picks: Tensor, lost: Tensor, fill: Tensor) -> Tensor:
    """Picks long `[b m]`, the first of `fill` `[b k]` in the places of those that are lost."""
    fill = torch.cat([fill[:, :1], fill], dim=1)  # what is lost counts from 1
    return torch.where(lost, fill.gather(1, lost.cumsum(1)), picks)


def _thinned(
    points: Tensor,
    square: Tensor,
    first: Tensor,
    out: Tensor | None,
    allowed: Tensor | None,
    barred: int,
    sure: int,
    spare: int,
    block: int,
    candidates: int,
) -> list[Tensor]:
    """The next points of `spread_points` with `thin`: several of long `[b count]`.

    What is `spare` decides on nothing that is taken before it: batch mates decide on that.
    """
    batch, size, _ = points.shape
    given = first.shape[1]
    seeds = (given + sure) // 2 - given if block > 1 else 0
    sample = SAMPLED * seeds
    taken, picks, good = first, [], None
    if 0 < sample < size:
        index = _scattered(size, sample, points.device).expand(batch, -1)
        again = index == first if given == 1 else (index[..., None] == first[:, None]).any(2)
        index = torch.cat([first, index], dim=1)
        apart = _apart(points, square, index)
        near = apart[:, :given]
        near = near if out is None else near.masked_fill(out[..., None], torch.inf)
        far = near.amin(1)
        far[:, :given] = TAKEN
        far[:, given:].masked_fill_(again, TAKEN)
        if allowed is not None:
            far.masked_fill_(~allowed.gather(1, index), BARRED)
        if sample - given - barred < seeds:  # the sample may hold too few free points
            free = (far >= 0).sum(1, keepdim=True)
            good = torch.arange(seeds, device=points.device) < free
        picks.append(index.gather(1, _in_turn(apart, far, seeds)))
        taken = torch.cat([first, picks[0]], dim=1)
        if out is not None or good is not None:
            out = torch.zeros_like(first, dtype=torch.bool) if out is None else out
            out = torch.cat([out, torch.zeros_like(picks[0]).bool() if good is None else ~good], 1)
        sure -= seeds
    distance = _nearest(points, square, taken, out)
    if allowed is not None:
        distance.masked_fill_(~allowed, BARRED)
    if good is not None:  # farthest points take the places, none measured by another
        left, fill = distance.topk(seeds, dim=1)
        picks[0] = _filled(picks[0], ~good, torch.where(left > BARRED, fill, fill[:, :1]))
        torch.minimum(distance, _nearest(points, square, picks[0], good), out=distance)
    kept = None
    keep = max(KEPT * sure, size // KEPT_ONE_OF, sure + given)
    if block > 1 and 2 * keep <= size and sure > block:  # one round measures no point again
        distance, kept = distance.topk(keep, dim=1, sorted=False)
        points, square = gather_rows(points, kept), square.gather(1, kept)
    candidates = min(candidates, points.shape[1])
    took = taken
    for i, count in enumerate(_counts(sure, spare, block, candidates)):
        if i:
            torch.minimum(distance, _nearest(points, square, took), out=distance)
        # Free points come before those that are taken, and these before those that are barred.
        far, index = distance.topk(candidates, dim=1, sorted=False)
        took = index.gather(1, _in_turn(_apart(points, square, index), far, count))
        picks.append(took if kept is None else kept.gather(1, took))
    return picks


def _scattered(size: int, num: int, device: torch.device) -> Tensor:
    """One place of each of `num` runs, which fill a list of `size`: long `[num]`.

    Where in its run looks like chance: with one place for all, runs half as long as a row of the
    picture would give two columns of it.
    """
    run = np.arange(num, dtype=np.int64)
    within = (run * run * 40503 & 0xFFFF) * (size // num) >> 16
    return torch.from_numpy(run * size // num + within).to(device, non_blocking=True)


def _apart(points: Tensor, square: Tensor, index: Tensor) -> Tensor:
    """Squared distances between points `[b k]`, `TAKEN` from each to itself: `[b k k]`."""
    chosen, own = gather_rows(points, index), square.gather(1, index)
    apart = less_products(own[:, None], chosen, chosen)
    apart.add_(own[..., None]).clamp_(min=0).diagonal(dim1=1, dim2=2).fill_(TAKEN)
    return apart


def _in_turn(apart: Tensor, far: Tensor, count: int) -> Tensor:
    """Farthest points by `_apart`, one by one: long `[b count]` of 0 to k - 1.

    `far` `[b k]` is their distance to what is taken; it is written over.
    """
    known = torch.bfloat16 not in (apart.dtype, far.dtype)  # to numpy; autocast makes such
    if known and far.device.type == "cpu" and not torch.compiler.is_compiling():
        return _in_turn_on_cpu(apart.numpy(), far.numpy(), count)
    batch, size = far.shape
    rows, row = apart.flatten(0, 1), torch.empty_like(far)
    start = torch.arange(0, batch * size, size, device=far.device) if batch > 1 else None
    picks = [far.argmax(1)]
    for _ in range(count - 1):
        index = picks[-1] if start is None else picks[-1] + start
        torch.index_select(rows, 0, index, out=row)
        picks.append(far.clamp_(max=row).argmax(1))
    return torch.cat(picks).view(count, batch).mT


def _in_turn_on_cpu(apart: NDArray[Any], far: NDArray[Any], count: int) -> Tensor:
    """`_in_turn` in a third of the time, which is that of calls, not of arithmetic."""
    picks = np.empty((count, len(far)), dtype=np.int64)
    picture = np.arange(len(far))
    for i in range(count):
        if i:
            np.minimum(far, apart[picture, picks[i - 1]], out=far)
        far.argmax(1, out=picks[i])
    return torch.from_numpy(picks).mT


def _take(points: Tensor, square: Tensor, distance: Tensor, nearer: Tensor, count: int) -> Tensor:
    """The next points of `spread_points` by distances `[b n]`: long `[b count]`."""
    runs, size = len(nearer), points.shape[1]
    length = -(-size // runs)
    padding = runs * length - size
    padded = F.pad(distance, (0, padding), value=BARRED) if padding else distance
    far, index = padded.view(-1, runs, length).max(2)
    index = index + torch.arange(0, runs * length, length, device=index.device)
    far, order = far.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    if padding >= length:  # a run of padding alone
        index.clamp_(max=size - 1)
    chosen, own = gather_rows(points, index), square.gather(1, index)
    apart = less_products(own[:, None], chosen, chosen)  # without what each row shares
    ahead = apart.masked_fill_(nearer, torch.inf).amin(2).add_(own).clamp_(min=0)
    place = torch.minimum(far, ahead).topk(count, dim=1).indices
    return index.gather(1, place)


def _free(distance: Tensor, took: Tensor) -> Tensor:
    """Put others in the place of picks that were taken before or must not be: long `[b count]`.

    Without a free point left, of those that may be taken.
    """
    lost = distance.gather(1, took) < 0
    rest = distance.scatter(1, torch.where(lost, took[:, :1], took), TAKEN)
    left, fill = rest.topk(took.shape[1], dim=1)
    return _filled(took, lost, torch.where(left > BARRED, fill, took[:, :1]))


def _nearest(points: Tensor, square: Tensor, taken: Tensor, out: Tensor | None = None) -> Tensor:
    """The squared distance of `[b n c]` to the nearest taken point, `TAKEN` of those: `[b n]`.

    `square` is |x|^2, `taken` long `[b g]`; `out` bool `[b g]` measures against others alone.
    """
    rows, own = gather_rows(points, taken), square.gather(1, taken)
    own = own if out is None else own.masked_fill(out, torch.inf)
    if taken.shape[1] < 16:
        # With tokens side by side in the product, the smallest of each is found many at a time.
        nearest = less_products(own[..., None], rows, points).amin(1)
    else:  # and this product is the faster one
        nearest = less_products(own[:, None], points, rows).amin(2)
    return nearest.add_(square).clamp_(min=0).scatter_(1, taken, TAKEN)


def less_products(square: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """square - 2 x y', in full precision whatever autocast says: differences are left of it."""
    with full_precision(x):
        return torch.baddbmm(square, x, y.mT, alpha=-2)


def gather_rows(points: Tensor, index: Tensor) -> Tensor:
    """Rows of `[b n c]` by long `[b m]`: `[b m c]`."""
    # Whole rows at a time, which `gather` does not know.
    return F.embedding(batch_rows(index, points.shape[1]), points.flatten(0, 1))


def batch_rows(index: Tensor, tokens: int) -> Tensor:
    """Rows of all pictures side by side for tokens long `[b m]` of pictures of so many tokens."""
    if len(index) > 1:
        index = index + torch.arange(0, len(index) * tokens, tokens, device=index.device)[:, None]
    return index
