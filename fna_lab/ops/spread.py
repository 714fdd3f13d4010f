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
        repeats: a promise that at most so many of `first` stand in it before, which saves time
            where `allowed` is None; None = no promise.
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
    spare = given - 1 if repeats is None else repeats
    spare = min(spare if allowed is None else given, num)
    missing = num - given + spare
    if not missing:
        return first
    lost = (first[:, :, None] == first[:, None]).tril(-1).any(2) if spare else None
    half = torch.linalg.vector_norm(points, dim=-1).square_().mul_(0.5)
    out = None
    if allowed is not None:
        assert lost is not None  # `spare` is positive
        lost |= ~allowed.gather(1, first)
        out = ~allowed.gather(1, first)
    # Half the squared distance to the nearest point taken.
    runs = min(candidates, size)
    length = -(-size // runs)
    padded = half.new_full((len(half), runs * length), BARRED)
    distance = padded[:, :size]
    given_rows = gather_rows(points, first), half.gather(1, first)
    distance.copy_(_nearest(points, half, *given_rows, out).scatter_(1, first, TAKEN))
    if allowed is not None:
        distance.masked_fill_(~allowed, BARRED)
    # Enough runs hold a free point, whatever was taken before.
    plenty = allowed is None and size - num >= min(block, runs) * length
    farther = torch.ones((runs, runs), dtype=torch.bool, device=points.device).tril_(-1)
    rounds = -(-missing // min(block, runs))
    picks = []
    for i in range(rounds):
        count = missing // rounds + int(i < missing % rounds)
        took, rows, own = _take(points, half, padded.view(len(half), runs, length), farther, count)
        if not plenty:
            took = _free(distance, took)
            rows, own = gather_rows(points, took), half.gather(1, took)
        picks.append(took)
        if i + 1 < rounds:
            closer = _nearest(points, half, rows, own).scatter_(1, took, TAKEN)
            torch.minimum(distance, closer, out=distance)
    more = torch.cat(picks, dim=1)
    if lost is None:
        return torch.cat([first, more], dim=1)
    # The last picks take the places of the given points that fell out.
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


def _take(
    points: Tensor, half: Tensor, distance: Tensor, farther: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next points of `spread_points` by distances `[b runs length]`: long `[b count]`.

    Also what those are: `[b count c]`, and half their squares `[b count]`.
    """
    far, index = distance.max(2)
    runs, length = distance.shape[1:]
    index = index + torch.arange(0, runs * length, length, device=index.device)
    far, order = far.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order).clamp_(max=points.shape[1] - 1)  # a run of padding alone
    chosen, own = gather_rows(points, index), half.gather(1, index)
    apart = torch.baddbmm(own[:, :, None] + own[:, None], chosen, chosen.mT, alpha=-1)
    ahead = apart.clamp_(min=0).masked_fill_(~farther, torch.inf).amin(2)
    place = torch.minimum(far, ahead).topk(count, dim=1).indices
    return index.gather(1, place), gather_rows(chosen, place), own.gather(1, place)


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
    points: Tensor, half: Tensor, rows: Tensor, own: Tensor, out: Tensor | None = None
) -> Tensor:
    """Half the squared distance of `[b n c]` to the nearest of `[b g c]`: `[b n]`.

    `half` and `own` are |x|^2 / 2 of both, `out` bool `[b g]` leaves some out.
    """
    own = own if out is None else own.masked_fill(out, torch.inf)
    # Tokens lie side by side in the product: the smallest of each is found many at a time.
    return (
        torch.baddbmm(own[..., None], rows, points.mT, alpha=-1).amin(1).add_(half).clamp_(min=0)
    )


def gather_rows(points: Tensor, index: Tensor) -> Tensor:
    """Rows of `[b n c]` by long `[b m]`: `[b m c]`."""
    batch, size, channels = points.shape
    if batch > 1:
        index = index + torch.arange(0, batch * size, size, device=index.device)[:, None]
    # Whole rows at a time, which `gather` does not know.
    return F.embedding(index, points.reshape(batch * size, channels))
