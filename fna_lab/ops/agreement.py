"""Whether two detectors agree: sets, ranks, and places of tokens in changed pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float


def set_counts(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens are in both sets, in the first and in the second.

    Args:
        first: bool `[... n]`.
        second: bool, of the same shape or one that broadcasts to it.

    Returns:
        Three long `[...]`.

    Raises:
        TypeError: a set is no bool tensor.
        ValueError: shapes do not fit.
    """
    first, second = _pair(first, second, "first", "second")
    if first.dtype != torch.bool or second.dtype != torch.bool:
        raise TypeError(f"Expected bool sets, got {first.dtype} and {second.dtype}.")
    return (first & second).sum(-1), first.sum(-1), second.sum(-1)


def set_agreement(both: Tensor, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """IoU of two sets, and precision and recall of the first against the second.

    Counts of several pictures may be added up before.

    Args:
        both: tokens that are in both sets.
        first: tokens that are in the first.
        second: tokens that are in the second, which stands for the truth.

    Returns:
        `iou`, `precision` (both / first) and `recall` (both / second), in double precision; NaN
        where nothing is counted: two empty sets neither agree nor disagree.
    """
    both, first, second = both.double(), first.double(), second.double()
    return {
        "iou": both / (first + second - both),
        "precision": both / first,
        "recall": both / second,
    }


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs.

    Args:
        values: `[... n]`.

    Returns:
        `[... n]`, in double precision.

    Raises:
        TypeError: `values` is not a floating tensor.
    """
    check_float("values", values, values.ndim, "[... n]")
    flat = values.reshape(-1, values.shape[-1]).contiguous()
    ordered = flat.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, flat, side="left")
    up_to = torch.searchsorted(ordered, flat, side="right")
    return ((below + up_to + 1).double() / 2).reshape(values.shape)


def rank_correlation(first: Tensor, second: Tensor, kept: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation along the last dimension.

    Args:
        first: `[... n]`.
        second: of the same shape or one that broadcasts to it.
        kept: entries that are no padding, bool `[... n]` or what broadcasts; None = all.

    Returns:
        `[...]` from -1 to 1, in double precision; NaN where one of them is constant.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit.

    Source: Spearman 1904; ties share their mean rank.
    """
    if kept is None:
        first, second = average_ranks(first), average_ranks(second)
        first, second = _pair(first, second, "first", "second")
        first = first - first.mean(-1, keepdim=True)
        second = second - second.mean(-1, keepdim=True)
    else:
        # Above all others, padding leaves their ranks as they are.
        first, second = (
            average_ranks(torch.where(kept, one, torch.inf)) * kept for one in (first, second)
        )
        first, second = _pair(first, second, "first", "second")
        count = kept.sum(-1, keepdim=True)
        first = (first - first.sum(-1, keepdim=True) / count) * kept
        second = (second - second.sum(-1, keepdim=True) / count) * kept
    scale = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return (first * second).sum(-1) / scale


def matching_places(
    grid: tuple[int, int],
    other: tuple[int, int],
    *,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    flip: bool = False,
) -> Tensor:
    """Where the tokens of a changed picture lie in the picture that it was made of.

    Args:
        grid: (rows, columns) of the patch tokens of the picture.
        other: (rows, columns) of the changed one: another resolution may have others.
        box: (top, left, bottom, right) of what the changed picture shows, in shares of the
            picture.
        flip: whether it is mirrored left to right, after it was cut out.

    Returns:
        Long `[rows * columns of other]`: the patch of `grid` that holds the centre of each patch
        of `other`, in row order.

    Raises:
        ValueError: a grid is empty, or the box does not lie inside the picture.
    """
    for name, value in (("grid", grid), ("other", other)):
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"Expected {name} to be (rows, columns) >= 1, got {value!r}.")
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"Expected box to be (top, left, bottom, right) in 0..1, got {box!r}.")
    down = (torch.arange(other[0], dtype=torch.double) + 0.5) / other[0]
    across = (torch.arange(other[1], dtype=torch.double) + 0.5) / other[1]
    if flip:
        across = 1 - across
    # A hair inwards, so that rounding never moves a centre that lies on an edge upwards.
    rows = ((top + down * (bottom - top)) * grid[0] - 1e-9).floor().long().clamp_(0, grid[0] - 1)
    columns = (left + across * (right - left)) * grid[1] - 1e-9
    columns = columns.floor().long().clamp_(0, grid[1] - 1)
    return (rows[:, None] * grid[1] + columns).flatten()


def _pair(first: Tensor, second: Tensor, *names: str) -> tuple[Tensor, Tensor]:
    try:
        one, two = torch.broadcast_tensors(first, second)
    except RuntimeError:
        raise ValueError(
            f"Expected {names[0]} and {names[1]} to have one shape, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        ) from None
    return one, two
