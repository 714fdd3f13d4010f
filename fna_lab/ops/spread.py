"""Points that are spread out: nearly the farthest ones, in a few matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index
from fna_lab.ops.kernels.switch import use_kernels
from fna_lab.ops.sketch import sketch_points

# What stands in a list of distances for points that were taken, and that must not be.
TAKEN, BARRED = -0.5, -1.0


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
) -> Tensor:
    """Nearly `farthest_points`, several at a time and by matrix products: fast.

    A round looks at one candidate of each of many runs of neighbouring tokens, that which is
    farthest from the points already taken; and takes the `block` candidates that lie farthest
    both from those points and from every candidate that lies farther out. All points are then
    measured against what the round took in one product. Distances are
    |x|^2 - 2 x p + |p|^2: equal points are at 0 up to rounding, and ties go anywhere. Nothing is
    copied to the host.

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
        block: most points that a round takes. 1 takes the farthest point each time.
        candidates: most candidates of a round.

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
    first = _first(points, num, first, allowed)
    points = _reduced(points, sketch)
    if points.dtype == torch.float32 and use_kernels(points):  # exact ones, and faster still
        from fna_lab.ops.kernels.points import farthest_points as on_chip

        return on_chip(points, num, first, allowed, repeats)
    size, given = points.shape[1], first.shape[1]
    repeats = min(given - 1 if repeats is None else repeats, given, num)
    gone = 0 if allowed is None else given if barred is None else min(barred, given)
    spare = min(repeats + gone, given, num)
    if num == given and not spare:
        return first
    lost = out = None
    if spare:
        lost = (first[:, :, None] == first[:, None]).tril(-1).any(2)
        if allowed is not None:
            out = ~allowed.gather(1, first)
            lost |= out
    square = torch.linalg.vector_norm(points, dim=-1).square_()
    runs = min(candidates, size)
    length = -(-size // runs)
    # The squared distance to the nearest point taken.
    rows, own = gather_rows(points, first), square.gather(1, first)
    distance = _nearest(points, square, rows, own, out).scatter_(1, first, TAKEN)
    if allowed is not None:
        distance.masked_fill_(~allowed, BARRED)
    # Enough runs hold a free point, whatever was taken before.
    barred = 0 if allowed is None else size if barred is None else barred
    counts = _counts(num - given + repeats, spare - repeats, block, runs)
    plenty = size - num - spare - barred >= max(counts) * length
    # Candidates come farthest first: which of them do not lie farther out than which.
    nearer = torch.ones((runs, runs), dtype=torch.bool, device=points.device).triu_()
    picks = [first]
    for i, count in enumerate(counts):
        if i:
            rows, own = gather_rows(points, picks[i]), square.gather(1, picks[i])
            closer = _nearest(points, square, rows, own).scatter_(1, picks[i], TAKEN)
            torch.minimum(distance, closer, out=distance)
        took = _take(points, square, distance, nearer, count)
        if not plenty:
            took = _free(distance, took)
        picks.append(took)
    if lost is None:
        return torch.cat(picks, dim=1)
    # The last picks take the places of the given points that fell out.
    more = torch.cat(picks[1:], dim=1)
    place = (lost.cumsum(1) + (num - given - 1)).clamp_(min=0)
    first = torch.where(lost, more.gather(1, place), first)
    return torch.cat([first, more[:, : num - given]], dim=1)


def _first(points: Tensor, num: int, first: Tensor | None, allowed: Tensor | None) -> Tensor:
    """The points to take first, long `[b g]` with g >= 1, once all arguments are checked."""
    batch, size, _ = points.shape
    if isinstance(num, bool) or not isinstance(num, int) or not 1 <= num <= size:
        raise ValueError(f"Expected num to be an integer from 1 to {size}, got {num!r}.")
    if allowed is not None:
        check_bool("allowed", allowed, (batch, size))
    if first is None or first.shape[1] == 0:
        if allowed is not None:
            return allowed.int().argmax(1, keepdim=True)
        return points.new_zeros((batch, 1), dtype=torch.long)
    check_index("first", first, "[b g]")
    if first.shape[1] > num:
        raise ValueError(f"Expected first to hold at most num={num} points, got {first.shape[1]}.")
    return first


def _reduced(points: Tensor, sketch: int | None) -> Tensor:
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
    apart = torch.baddbmm(own[:, None], chosen, chosen.mT, alpha=-2)  # less what each row shares
    ahead = apart.masked_fill_(nearer, torch.inf).amin(2).add_(own).clamp_(min=0)
    place = torch.minimum(far, ahead).topk(count, dim=1).indices
    return index.gather(1, place)


def _free(distance: Tensor, took: Tensor) -> Tensor:
    """Put others in the place of picks that were taken before or must not be: long `[b count]`.

    Without a free point left, of those that may be taken.
    """
    good = distance.gather(1, took) >= 0
    rest = distance.scatter(1, torch.where(good, took, took[:, :1]), TAKEN)
    left, fill = rest.topk(took.shape[1], dim=1)
    fill = torch.where(left > BARRED, fill, took[:, :1])
    place = (~good).cumsum(1).sub_(1).clamp_(min=0)
    return torch.where(good, took, fill.gather(1, place))


def _nearest(
    points: Tensor, square: Tensor, rows: Tensor, own: Tensor, out: Tensor | None = None
) -> Tensor:
    """The squared distance of `[b n c]` to the nearest of `[b g c]`: `[b n]`.

    `square` and `own` are |x|^2 of both, `out` bool `[b g]` leaves some out.
    """
    own = own if out is None else own.masked_fill(out, torch.inf)
    # Tokens lie side by side in the product: the smallest of each is found many at a time.
    return (
        torch.baddbmm(own[..., None], rows, points.mT, alpha=-2).amin(1).add_(square).clamp_(min=0)
    )


def gather_rows(points: Tensor, index: Tensor) -> Tensor:
    """Rows of `[b n c]` by long `[b m]`: `[b m c]`."""
    batch, size, channels = points.shape
    if batch > 1:
        index = index + torch.arange(0, batch * size, size, device=index.device)[:, None]
    # Whole rows at a time, which `gather` does not know.
    return F.embedding(index, points.reshape(batch * size, channels))
