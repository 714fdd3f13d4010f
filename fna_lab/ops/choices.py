"""Ways to choose landmark tokens beside farthest points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import attention_logits, full_precision
from fna_lab.ops.checks import check_bool, check_float, check_index
from fna_lab.ops.spread import gather_rows


def grid_cells(grid: tuple[int, int], num: int) -> list[int]:
    """Patch indices at the centres of a regular grid of at most `num` cells, in row order.

    Args:
        grid: (rows, columns) of the patch tokens.
        num: most cells.

    Returns:
        At most `num` indices; fewer where no grid of the picture's aspect has exactly `num` cells.
    """
    rows, columns = grid
    down = min(rows, round((num * rows / columns) ** 0.5))
    across = min(columns, num // down) if down else 0
    return [
        int((i + 0.5) * rows / down) * columns + int((j + 0.5) * columns / across)
        for i in range(down)
        for j in range(across)
    ]


def put_first(picks: Tensor, wanted: Tensor) -> Tensor:
    """Wanted tokens before the others that were picked, as many in all as there were picks.

    Args:
        picks: token indices, long `[b m]`.
        wanted: bool `[b n]`; their number may differ from row to row.

    Returns:
        Long `[b m]`: wanted tokens in ascending order, cut off at m, then the picks that are not
        wanted in their order. No index repeats that did not repeat in `picks`.
    """
    check_index("picks", picks, "[b m]")
    check_bool("wanted", wanted, (picks.shape[0], wanted.shape[1]))
    most = picks.shape[1]
    first = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    both = torch.cat([first, picks], dim=1)
    useless = torch.cat([~wanted.gather(1, first), wanted.gather(1, picks)], dim=1)
    order = useless.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return both.gather(1, order)


def segment_centres(allowed: Tensor, num: int) -> Tensor:
    """The middle token of each of `num` equal segments of the allowed tokens, in their order.

    Args:
        allowed: bool `[b n]`, at least one True a row.
        num: number of segments; with fewer allowed tokens than that, centres repeat.

    Returns:
        Long `[b num]`.

    Source: the segments of Xiong et al. 2021 (Nystroemformer).
    """
    check_bool("allowed", allowed, tuple(allowed.shape))
    count = allowed.cumsum(1)
    place = (torch.arange(num, dtype=torch.float32, device=allowed.device) + 0.5) / num
    wanted = (place * count[:, -1:]).long().clamp_(max=allowed.shape[1] - 1) + 1
    return torch.searchsorted(count, torch.minimum(wanted, count[:, -1:]))


def cluster_medoids(points: Tensor, seeds: Tensor, *, allowed: Tensor, steps: int = 3) -> Tensor:
    """The token nearest to the mean of each cluster, after a few steps of k-means.

    Clusters have no token in common, so that medoids are distinct wherever seeds are.

    Args:
        points: `[b n c]`.
        seeds: tokens whose points are the first means, long `[b m]`.
        allowed: bool `[b n]`, False = in no cluster.
        steps: Lloyd steps.

    Returns:
        Long `[b m]`; a cluster that ran empty keeps its seed.

    Source: Lloyd 1982.
    """
    check_float("points", points, 3, "[b n c]")
    check_index("seeds", seeds, "[b m]", below=points.shape[1])
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    means = gather_rows(points, seeds)
    with full_precision(points):
        distance, member = _clusters(points, means, allowed)
        for _ in range(steps):
            weight = member.to(points.dtype)
            total = weight.sum(1)[..., None]
            means = torch.where(total > 0, weight.mT @ points / total.clamp(min=1), means)
            distance, member = _clusters(points, means, allowed)
    medoids = distance.masked_fill(~member, torch.inf).argmin(1)
    return torch.where(member.any(1), medoids, seeds)


def _clusters(points: Tensor, means: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `[b n m]`, and which token belongs to which mean, bool `[b n m]`."""
    distance = torch.cdist(points, means)
    member = F.one_hot(distance.argmin(2), means.shape[1]).bool()
    return distance, member & allowed[..., None]


def leverage_scores(
    points: Tensor, *, ridge: float = 1e-2, allowed: Tensor | None = None
) -> Tensor:
    """Ridge leverage of each point, x' (X'X + lambda n mean(|x|^2) / c I)^-1 x.

    Args:
        points: `[b n c]`.
        ridge: lambda, relative to the mean eigenvalue of X'X.
        allowed: bool `[b n]`, False = left out, with score 0; None = all.

    Returns:
        `[b n]`, each from 0 to 1.

    Source: Alaoui and Mahoney 2015, with a linear kernel.
    """
    check_float("points", points, 3, "[b n c]")
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if allowed is not None:
        points = points.masked_fill(~allowed[..., None], 0)
    with full_precision(points):
        gram = points.mT @ points
        level = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=1e-12)
        gram = gram + torch.diag_embed((ridge * level).expand(-1, gram.shape[-1]))
        factor = torch.linalg.cholesky(gram)
        half = torch.linalg.solve_triangular(factor, points.mT, upper=False)
    return half.square().sum(1)


def spread_queries(
    patches: int,
    num: int,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    has_cls: bool = False,
) -> list[int]:
    """CLS, where there is one, and at most `num` evenly spread patch tokens.

    Args:
        patches: number of patch tokens.
        num: most patch tokens.
        grid: (rows, columns) of the patch tokens; None = spread along the sequence.
        prefix: tokens before the patch tokens.
        has_cls: whether token 0 is CLS.

    Returns:
        Token indices, CLS first.
    """
    if grid is not None and grid[0] * grid[1] == patches:
        cells = grid_cells(grid, num)
    else:
        count = min(num, patches)
        cells = [int((i + 0.5) * patches / count) for i in range(count)]
    return [0] * has_cls + [prefix + cell for cell in cells]


def drawn_attention(
    q: Tensor,
    k: Tensor,
    rows: list[int],
    *,
    scale: float,
    keys: Tensor | None = None,
    first_half: bool = False,
) -> Tensor:
    """Attention that each token draws from a few queries, in O(n d) a query.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        rows: tokens whose attention is looked at; those that are not in `keys` are left out.
        scale: factor of the logits.
        keys: bool `[b n]`, True = may be attended to, and may be asked; None = all.
        first_half: give the first row half of the weight, and the others the other half.

    Returns:
        `[b h n]`, in at least float32; 0 for what is not in `keys`. Rows sum to 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("q", q, 4, "[b h n d]")
    check_float("k", k, 4, "[b h n d]")
    index = torch.tensor(rows, device=q.device)
    logits = attention_logits(q[:, :, index], k, scale)
    others = max(len(rows) - 1, 1)
    each = 0.5 / others if first_half else 1.0 / len(rows)
    share = torch.full((len(rows),), each, dtype=torch.float32)
    if first_half:
        share[0] = 0.5
    share = share.to(logits).expand(q.shape[0], -1)  # [b r]
    if keys is None:
        with full_precision(q):
            return (share[:, None, None] @ logits.softmax(-1))[:, :, 0]
    check_bool("keys", keys, (q.shape[0], k.shape[2]))
    # A row that is left out leaves its share to the others; without any, all are asked.
    asked = share * keys[:, index]
    asked = torch.where(asked.sum(1, keepdim=True) > 0, asked, share)
    asked = asked / asked.sum(1, keepdim=True)
    least = torch.finfo(logits.dtype).min
    pattern = logits.masked_fill(~keys[:, None, None], least).softmax(-1)
    with full_precision(q):
        return (asked[:, None, None] @ pattern)[:, :, 0].masked_fill(~keys[:, None], 0)
