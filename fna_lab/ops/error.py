"""How far an approximated attention lies from the exact one, and whether its solve can be trusted.

Means over tokens of a class are taken picture by picture and head by head, so that nothing
depends on the batch; where a picture has no token of a class they are NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float
from fna_lab.ops.solvers import check_matrix

# The largest condition number that is told: float64 knows nothing beyond it.
SINGULAR = 1e16

Solve = Callable[[Tensor, Tensor], Tensor]


def mean_of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the tokens of a class.

    Args:
        values: one number a token `[b h n]`.
        tokens: the class, bool `[b n]`.

    Returns:
        `[b h]`, float64; NaN where a picture has no such token.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("values", values, 3, "[b h n]")
    check_bool("tokens", tokens, (values.shape[0], values.shape[2]))
    kept = values.double().masked_fill(~tokens[:, None], 0).sum(-1)
    return kept / tokens.sum(-1, dtype=torch.double)[:, None]


def relative_error(approximate: Tensor, exact: Tensor, tokens: Tensor | None = None) -> Tensor:
    """||approximate - exact|| / ||exact|| over tokens, of each head.

    Args:
        approximate: attention outputs `[b h n d]`.
        exact: those of exact attention on the same queries, keys and values.
        tokens: over which tokens, bool `[b n]`; None = all.

    Returns:
        `[b h]`, float64; 0 where both are zero, NaN where a picture has no such token.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    _same("approximate", approximate, exact)
    wrong = (approximate.double() - exact.double()).square().sum(-1)
    right = exact.double().square().sum(-1)
    if tokens is None:
        wrong, right = wrong.sum(-1), right.sum(-1)
    else:
        wrong, right = mean_of_tokens(wrong, tokens), mean_of_tokens(right, tokens)
    return torch.where(wrong == 0, wrong, (wrong / right).sqrt())


def output_cosine(approximate: Tensor, exact: Tensor) -> Tensor:
    """Cosine of each head's output with the exact one, token by token.

    Args:
        approximate: attention outputs `[b h n d]`.
        exact: those of exact attention.

    Returns:
        `[b h n]`, float64; 1 for equal vectors, zero vectors included.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    _same("approximate", approximate, exact)
    a, b = approximate.double(), exact.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return torch.where((a == b).all(-1), 1.0, cosine)


def weight_facts(attend: Callable[[Tensor], Tensor], like: Tensor) -> dict[str, Tensor]:
    """Rows of the n x n matrix W that an attention applies to its values, never held as a whole.

    Every attention here is linear in its values, so that what it makes of one-hot values are the
    columns of W, and what it makes of ones are its row sums. d columns are taken at a time:
    O(n d) memory a head, and n / d calls.

    Args:
        attend: values `[b h n d]` -> outputs `[b h n d]`, linear, on fixed queries and keys.
        like: the values that it works on; shape, type and device of those that it is given here.

    Returns:
        Each `[b h n]`, float64, one number a row. `row_sum`: 1 for exact attention.
        `negative_share`: share of the n entries that are below 0 by more than rounding.
        `negative_mass`: the absolute sum of those below 0 over that of the row.

    Raises:
        TypeError: `like` is not a floating tensor.
        ValueError: it is not `[b h n d]`.
    """
    check_float("like", like, 4, "[b h n d]")
    batch, heads, n, d = like.shape
    zeros = torch.zeros(batch, heads, n, dtype=torch.double, device=like.device)
    total, negative, below = zeros.clone(), zeros.clone(), zeros.clone()
    for start in range(0, n, d):
        width = min(d, n - start)
        columns = torch.zeros_like(like)
        hot = torch.arange(width, device=like.device)
        columns[:, :, start + hot, hot] = 1
        weights = attend(columns)[..., :width].double()
        total += weights.abs().sum(-1)
        negative += weights.clamp(max=0).abs().sum(-1)
        below += (weights < -4 * torch.finfo(like.dtype).eps).sum(-1)
    return {
        "row_sum": attend(torch.ones_like(like))[..., 0].double(),
        "negative_share": below / n,
        "negative_mass": negative / total.clamp_min(torch.finfo(torch.double).tiny),
    }


def condition_number(kernel: Tensor) -> Tensor:
    """Largest over smallest singular value.

    Args:
        kernel: A `[... r m]`.

    Returns:
        `[...]`, float64, at most 1e16, which stands for singular.

    Raises:
        TypeError: `kernel` is not a floating tensor.
        ValueError: it is no matrix.
    """
    check_matrix(kernel)
    values = torch.linalg.svdvals(kernel.double())
    return values[..., 0] / torch.maximum(values[..., -1], values[..., 0] / SINGULAR)


def inverse_residual(kernel: Tensor, solve: Solve) -> Tensor:
    """||I - A Z|| / ||I||, for a solver that acts as an inverse Z of A.

    A penalty or a truncation keeps the small directions of A out of Z on purpose, so that a high
    residual alone does not say that the solver is bad; 1 is what Z = 0 has.

    Args:
        kernel: A `[b h r m]`, r <= m: with more rows than columns nothing is an inverse.
        solve: (A, B `[b h r r]`) -> Z(A) B, linear in B.

    Returns:
        `[b h]`, float64, Frobenius norms.

    Raises:
        TypeError: `kernel` is not a floating tensor.
        ValueError: it has more rows than columns.
    """
    check_matrix(kernel)
    rows = kernel.shape[-2]
    if rows > kernel.shape[-1]:
        raise ValueError(
            f"Expected kernel [... r m] with r <= m, got {tuple(kernel.shape)}: nothing is its "
            "inverse."
        )
    eye = torch.eye(rows, dtype=kernel.dtype, device=kernel.device)
    eye = eye.expand(*kernel.shape[:-2], rows, rows).contiguous()
    return solve_residual(kernel, solve(kernel, eye), eye)


def solve_residual(kernel: Tensor, solution: Tensor, values: Tensor) -> Tensor:
    """||A X - B|| / ||B||: how far a solution misses the exact outputs that it is to fit.

    Row by row, B is the exact attention of the landmark queries, and A X what the approximation
    gives them.

    Args:
        kernel: A `[... r m]`.
        solution: X = Z(A) B `[... m d]`.
        values: B `[... r d]`.

    Returns:
        `[...]`, float64; 0 where B and A X are zero, infinite where X is not finite.

    Raises:
        TypeError: `kernel` is not a floating tensor.
        ValueError: it is no matrix, or shapes do not fit.
    """
    check_matrix(kernel)
    *lead, rows, marks = kernel.shape
    wanted = (*lead, marks, values.shape[-1]), (*lead, rows, values.shape[-1])
    if (tuple(solution.shape), tuple(values.shape)) != wanted:
        raise ValueError(
            f"Expected solution [... {marks} d] and values [... {rows} d], got "
            f"{tuple(solution.shape)} and {tuple(values.shape)}."
        )
    wrong = (kernel.double() @ solution.double() - values.double()).flatten(-2).norm(dim=-1)
    residual = torch.where(wrong == 0, wrong, wrong / values.double().flatten(-2).norm(dim=-1))
    return residual.nan_to_num(torch.inf)


def _same(name: str, value: Tensor, exact: Tensor) -> None:
    for label, tensor in ((name, value), ("exact", exact)):
        check_float(label, tensor, 4, "[b h n d]")
    if value.shape != exact.shape:
        raise ValueError(
            f"Expected {name} and exact of one shape, got {tuple(value.shape)} and "
            f"{tuple(exact.shape)}."
        )
