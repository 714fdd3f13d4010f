"""One option for each of several items: least cost under a limit."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def cheapest_choice(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    limit: float,
    *,
    steps: int = 4096,
) -> list[int]:
    """One option of each item, so that errors add up to at most a limit, at the least cost.

    Dynamic programming over the limit in equal steps; errors are rounded up to steps, so that the
    limit holds without a tolerance.

    Args:
        costs: of each item's options.
        errors: of the same, at least 0.
        limit: of the sum of errors, above 0.
        steps: into how many steps the limit is cut.

    Returns:
        The index of the option of each item.

    Raises:
        ValueError: no choice keeps to the limit, or the lists do not fit.
    """
    if [len(row) for row in costs] != [len(row) for row in errors] or not costs:
        raise ValueError("Expected costs and errors of the same options, of at least one item.")
    if not limit > 0:
        raise ValueError(f"Expected limit to be > 0, got {limit!r}.")
    best = torch.zeros(steps + 1, dtype=torch.double)  # least cost with at most so many steps
    taken, used = [], []
    for prices, wrongs in zip(costs, errors, strict=True):
        wrong = torch.tensor(wrongs, dtype=torch.double)
        if not (wrong >= 0).all():
            raise ValueError(f"Expected errors >= 0, got {list(wrongs)}.")
        # 1e-9: an error of exactly so many steps must not be rounded up to one more.
        size = (wrong / limit * steps - 1e-9).ceil().clamp(0, steps + 1).long()
        rows = torch.full((len(prices), steps + 1), torch.inf, dtype=torch.double)
        for i, price in enumerate(prices):
            rows[i, size[i] :] = best[: steps + 1 - int(size[i])] + price
        best, index = rows.min(dim=0)
        taken.append(index)
        used.append(size)
    if torch.isinf(best[steps]):
        raise ValueError(f"No choice keeps the sum of errors within {limit}.")
    choice, left = [], steps
    for index, size in zip(reversed(taken), reversed(used), strict=True):
        choice.append(int(index[left]))
        left -= int(size[choice[-1]])
    return choice[::-1]
