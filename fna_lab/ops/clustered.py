"""Nystroem attention whose landmarks stand for clusters of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index, check_qkv, default_scale
from fna_lab.ops.nystrom import gather_tokens, nystrom_chain


def nearest_landmarks(
    points: Tensor, landmarks: Tensor, *, allowed: Tensor | None = None
) -> Tensor:
    """The landmark that each token is nearest to, in squared Euclidean distance.

    A landmark is its own, so that no cluster is empty; one that stands in the list before is none.

    Args:
        points: `[b n c]`.
        landmarks: token indices, long `[b m]`.
        allowed: bool `[b n]`, False = in no cluster; None = all are in one.

    Returns:
        Positions in the list of landmarks, long `[b n]`; -1 = in no cluster.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("points", points, 3, "[b n c]")
    check_index("landmarks", landmarks, "[b m]")
    if landmarks.shape[0] != points.shape[0]:
        raise ValueError(
            f"Expected landmarks [{points.shape[0]} m], got {tuple(landmarks.shape)}."
        )
    if allowed is not None:
        check_bool("allowed", allowed, tuple(points.shape[:2]))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    marks = points.gather(1, landmarks[..., None].expand(-1, -1, points.shape[2]))
    # |x|^2 is the same for all landmarks.
    square = marks.square().sum(-1)[:, None]
    members = torch.baddbmm(square, points, marks.mT, alpha=-2).argmin(2)
    place = torch.arange(landmarks.shape[1], device=landmarks.device).expand_as(landmarks)
    members = members.scatter_reduce(1, landmarks, place, "amin", include_self=False)
    return members if allowed is None else members.masked_fill(~allowed, -1)


def cluster_means(x: Tensor, members: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Means over clusters of tokens, and how many tokens each holds.

    Args:
        x: `[b h n d]`.
        members: the cluster of each token, long `[b n]`, 0 to num - 1; -1 = none.
        num: number of clusters m.

    Returns:
        Means `[b h m d]`, zero where a cluster is empty, and sizes `[b m]`.
    """
    batch, heads, tokens, dim = x.shape
    rows = x.transpose(1, 2).reshape(batch, tokens, heads * dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    take = _bagged_means if x.device.type == "cpu" else _product_means
    means, sizes = take(rows.to(wide), members, num)
    means = means.to(x.dtype).reshape(batch, num, heads, dim).transpose(1, 2)
    # Contiguous, or the rounding of products with them depends on the batch.
    return means.contiguous(), sizes


def _product_means(rows: Tensor, members: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Means `[b m c]` of rows `[b n c]`, and sizes `[b m]`, by a product: alike at every run."""
    weights = (members[:, None] == torch.arange(num, device=rows.device)[:, None]).to(rows.dtype)
    sizes = weights.sum(2)
    return (weights / sizes.clamp(min=1)[..., None]) @ rows, sizes


def _bagged_means(rows: Tensor, members: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Means `[b m c]` of rows `[b n c]`, and sizes `[b m]`: sorted, then added up side by side."""
    batch, tokens, channels = rows.shape
    members, order = torch.where(members < 0, num, members).sort(dim=1, stable=True)
    names = torch.arange(num + 1, device=rows.device).expand(batch, -1).contiguous()
    begin = torch.searchsorted(members, names)
    first = tokens * torch.arange(batch, device=rows.device)[:, None]
    means = F.embedding_bag(
        (order + first).flatten(),
        rows.reshape(batch * tokens, channels),
        (begin + first).flatten(),
        mode="mean",
    )
    return means.view(batch, num + 1, channels)[:, :num], begin.diff(dim=1).to(rows.dtype)


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    members: Tensor,
    solve: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float | None = None,
    more_rows: Tensor | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Attention to clusters of tokens, with values that fit the exact rows of the landmarks.

    out = softmax(s Q C' + log w) V', with the mean key C and the size w of each cluster. V' is
    the landmarks' own value Vp, put right where the landmarks' exact outputs say so:
    V' = Vp + Z(A) (softmax(s Qp K') V - A Vp), A = softmax(s Qp C' + log w). With every token a
    landmark this is exact attention, and whatever Z damps falls back to plain attention to
    clusters instead of to zero.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        landmarks: token indices, long `[b m]`.
        members: the landmark of each token, as `nearest_landmarks` tells.
        solve: (A `[b h r m]`, B `[b h r d]`) -> Z(A) B.
        scale: factor of the logits; None = d^-1/2.
        more_rows: tokens whose exact outputs V' must fit beside those of the landmarks, long
            `[b t]`; then A has r = m + t rows.
        keys: bool `[b n]`, True = may be attended to; None = all. Landmarks must be such keys, and
            other tokens in no cluster.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing. A cluster has
            that of its landmark.
        exact_rows: give so many of the first landmarks their exact outputs.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: the chain of Xiong et al. 2021 (Nystroemformer); sizes in the logits as in the
    proportional attention of Bolya et al. 2023 (ToMe).
    """
    check_qkv(q, k, v)
    check_index("landmarks", landmarks, "[b m]")
    check_index("members", members, "[b n]")
    if members.shape != (k.shape[0], k.shape[2]) or landmarks.shape[0] != q.shape[0]:
        raise ValueError(
            f"Expected landmarks [{q.shape[0]} m] and members [{k.shape[0]} {k.shape[2]}], got "
            f"{tuple(landmarks.shape)} and {tuple(members.shape)}."
        )
    if keys is not None:
        check_bool("keys", keys, (q.shape[0], k.shape[2]))
    tokens = landmarks if more_rows is None else torch.cat([landmarks, more_rows], dim=1)
    means, sizes = cluster_means(k, members, landmarks.shape[1])
    # A repeated landmark has no cluster: log 0 keeps everybody from it.
    columns = corner = sizes.log()[:, None, None]
    rows = None
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        rows = gather_tokens(bias, tokens)  # [b h r n]
        columns = columns + gather_tokens(bias.mT, landmarks).mT  # [b h n m]
        corner = gather_tokens(columns, tokens)  # [b h r m]
    if keys is not None:
        keep = keys[:, None, None]
        rows = keep if rows is None else rows.masked_fill(~keep, -torch.inf)
    out, exact = nystrom_chain(
        q,
        k,
        v,
        gather_tokens(q, tokens),
        means,
        solve,
        scale=default_scale(q) if scale is None else scale,
        rows=rows,
        columns=columns.to(q.dtype),
        corner=corner,
        dead=None if keys is None else sizes == 0,
        prior=gather_tokens(v, landmarks),
    )
    if not exact_rows:
        return out
    index = landmarks[:, None, :exact_rows, None].expand(-1, q.shape[1], -1, q.shape[3])
    if out.requires_grad:  # the fused kernel keeps its output for the backward pass
        return out.scatter(2, index, exact[:, :, :exact_rows])
    return out.scatter_(2, index, exact[:, :, :exact_rows])
