"""Nystroem attention whose landmarks stand for clusters of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import as_bias, attention_logits, attention_with_lse, full_precision
from fna_lab.ops.checks import (
    check_bool,
    check_float,
    check_index,
    check_integer,
    check_qkv,
    default_scale,
)
from fna_lab.ops.kernels.switch import on_cpu
from fna_lab.ops.nystrom import (
    check_landmarks,
    each_head,
    gather_tokens,
    nystrom_chain,
    only_keys,
    packed_rows,
    put_tokens,
    repeated_landmarks,
)
from fna_lab.ops.spread import batch_rows, gather_rows, less_products


def nearest_landmarks(
    points: Tensor,
    landmarks: Tensor,
    *,
    allowed: Tensor | None = None,
    distinct: bool = False,
) -> Tensor:
    """The landmark that each token is nearest to, in squared Euclidean distance.

    A landmark is its own, so that no cluster is empty; but one that stands in the list before has
    none.

    Args:
        points: `[b n c]`.
        landmarks: token indices, long `[b m]`.
        allowed: bool `[b n]`, False = in no cluster; None = all are in one.
        distinct: a promise that no landmark repeats, which saves time.

    Returns:
        Positions in the list of landmarks, long `[b n]`; -1 = in no cluster.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("points", points, 3, "[b n c]")
    check_index("landmarks", landmarks, "[b m]", below=points.shape[1])
    if landmarks.shape[0] != points.shape[0]:
        raise ValueError(
            f"Expected landmarks [{points.shape[0]} m], got {tuple(landmarks.shape)}."
        )
    if landmarks.shape[1] == 0:
        raise ValueError("Expected at least one landmark, got none.")
    if allowed is not None:
        check_bool("allowed", allowed, tuple(points.shape[:2]))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if on_cpu(points.shape[1], points):
        from fna_lab.ops.kernels import compiled

        return compiled.nearest(points, landmarks, allowed)
    marks = gather_rows(points, landmarks)
    square = marks.square().sum(-1)  # |x|^2 is the same for all landmarks
    place = torch.arange(landmarks.shape[1], device=landmarks.device).expand_as(landmarks)
    if not distinct:
        square.masked_fill_(repeated_landmarks(landmarks), torch.inf)
    members = less_products(square[:, None], points, marks).argmin(2)
    if distinct:
        members.scatter_(1, landmarks, place)
    else:
        members = members.scatter_reduce(1, landmarks, place, "amin", include_self=False)
    return members if allowed is None else members.masked_fill(~allowed, -1)


class ClusterRuns:
    """Tokens sorted by their clusters, once somebody asks; see `cluster_runs`."""

    def __init__(self, members: Tensor, num: int) -> None:
        self.members, self.num = members, num
        self._sorted: SortedTokens | None = None

    def sorted(self) -> SortedTokens:
        """Tokens in their runs."""
        if self._sorted is None:
            members, order = self.members.sort(dim=1, stable=True)
            names = torch.arange(-1, self.num + 1, device=members.device).expand(len(members), -1)
            begin = torch.searchsorted(members, names.contiguous())
            self._sorted = SortedTokens(order, begin[:, :-1], begin[:, 1:].diff(dim=1).float())
        return self._sorted


class SortedTokens(NamedTuple):
    """Tokens sorted by their clusters.

    Attributes:
        order: tokens long `[b n]`, those in no cluster first.
        begin: where in that list the run of those in no cluster begins, and that of each cluster:
            long `[b m + 1]`.
        sizes: tokens in each cluster, float32 `[b m]`.
    """

    order: Tensor
    begin: Tensor
    sizes: Tensor


def cluster_runs(members: Tensor, num: int) -> ClusterRuns:
    """Tokens sorted by their clusters, for `cluster_means` of several layers.

    Args:
        members: the cluster of each token, long `[b n]`, 0 to num - 1; -1 = none.
        num: number of clusters m.
    """
    return ClusterRuns(members, num)


def cluster_means(
    x: Tensor, members: Tensor, num: int, *, runs: ClusterRuns | None = None
) -> tuple[Tensor, Tensor]:
    """Means over clusters of tokens, and how many tokens each holds.

    Args:
        x: `[b h n d]`.
        members: the cluster of each token, long `[b n]`, or per head `[b h n]`, 0 to num - 1;
            -1 = none.
        num: number of clusters m.
        runs: what `cluster_runs` makes of `members` `[b n]`, where that is known.

    Returns:
        Means `[b h m d]`, zero where a cluster is empty, and sizes `[b m]`, or per head `[b h m]`.
    """
    if members.ndim == 3:  # heads are like pictures of one head
        means, sizes = cluster_means(x.flatten(0, 1)[:, None], members.flatten(0, 1), num)
        return means.view(*x.shape[:2], num, x.shape[3]), sizes.view(*x.shape[:2], num)
    batch, heads, tokens, dim = x.shape
    if members.shape == (batch, tokens) and on_cpu(tokens, x):
        from fna_lab.ops.kernels import compiled

        return compiled.means(x, members, num)
    if x.device.type == "cpu":
        if runs is None or runs.members is not members:  # a part of the pictures, run again
            runs = cluster_runs(members, num)
        means, sizes = _bagged_means(x, runs.sorted())
    else:
        means, sizes = _product_means(x, members, num)
    means = means.to(x.dtype).reshape(batch, num, heads, dim).transpose(1, 2)
    # Contiguous, or the rounding of products with them depends on the batch.
    return means.contiguous(), sizes


def _product_means(x: Tensor, members: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Means `[b m h*d]` of `[b h n d]`, and sizes `[b m]`, by a product: alike at every run."""
    rows = x.transpose(1, 2).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    weights = (members[:, None] == torch.arange(num, device=rows.device)[:, None]).to(rows.dtype)
    sizes = weights.sum(2)
    return (weights / sizes.clamp(min=1)[..., None]) @ rows, sizes


def _bagged_means(x: Tensor, runs: SortedTokens) -> tuple[Tensor, Tensor]:
    """Means `[b m h*d]` of `[b h n d]`, and sizes `[b m]`: sorted, then added up in runs."""
    batch, _, tokens, _ = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    table, order = packed_rows(x), batch_rows(runs.order, tokens)
    if table is None:
        table = x.transpose(1, 2).flatten(2).flatten(0, 1)
    elif not table.is_contiguous():  # what lies between two rows are rows that nobody asks for
        step = table.stride(0) // table.shape[1]
        rows = (len(table) - 1) * step + 1
        table, order = table.as_strided((rows, table.shape[1]), (table.shape[1], 1)), order * step
    # Bag 0 is of those in no cluster: the first bag has to begin at the first token.
    bags = batch_rows(runs.begin, tokens).flatten()
    means = F.embedding_bag(order.flatten(), table, bags, mode="mean")
    means = means.view(batch, runs.begin.shape[1], table.shape[1])
    return means[:, 1:], runs.sizes.to(table.dtype)


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    members: Tensor,
    solver: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    distinct: bool | None = None,
    exact_rows: int = 0,
    removed: tuple[Tensor, Tensor] | None = None,
    own: bool = False,
    sunk: bool = False,
    runs: ClusterRuns | None = None,
) -> Tensor:
    """Attention to clusters of tokens, with values that fit exact rows of attention.

    out = softmax(s Q C' + log w) V', with the mean key C and the size w of each cluster. V' is
    the landmarks' own value Vp, put right where the exact outputs of some tokens r, by default
    the landmarks, say so:
    V' = Vp + Z(A) (softmax(s Qr K') V - A Vp), A = softmax(s Qr C' + log w).
    With every token a landmark this is exact attention, and whatever Z damps falls back to plain
    attention to clusters instead of to zero.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        landmarks: token indices, long `[b m]`, or `[b h m]` where heads have their own.
        members: the landmark of each token, as `nearest_landmarks` tells: long `[b n]`, or
            `[b h n]` where heads have their own.
        solver: (A `[b h r m]`, B `[b h r d]`) -> Z(A) B. One whose attribute `kernel_ridge` is a
            number is `ridge_solve` with that penalty, which compiled kernels do themselves.
        scale: factor of the logits; None = d^-1/2.
        rows: tokens whose exact outputs V' must fit, long `[b r]`, or `[b h r]`; None = the
            landmarks.
        keys: bool `[b n]`, True = may be attended to; None = all. Landmarks must be such keys, and
            other tokens in no cluster.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing. A cluster has
            that of its landmark.
        distinct: whether no landmark repeats; None = none does without `keys`, and may with them.
        exact_rows: give so many of the first of `rows` their exact outputs.
        removed: tokens T of a mask, as `token_rows` gives them: long `[b t]`, and bool `[b t]`,
            False = padding; `keys` and clusters leave them out, unless they are `sunk`.
        own: whether each token of T sees itself nevertheless (`type2`).
        sunk: whether the values of T count as zero (stage `sink`); `v` holds what they were.
        runs: what `cluster_runs` makes of `members` `[b n]`, where that is known.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or there are both a bias and `removed` tokens.

    Source: the chain of Xiong et al. 2021 (Nystroemformer); sizes in the logits as in the
    proportional attention of Bolya et al. 2023 (ToMe).
    """
    check_qkv(q, k, v)
    check_landmarks(landmarks, q)
    if members.shape != (*landmarks.shape[:-1], k.shape[2]) or members.dtype != torch.long:
        raise ValueError(
            f"Expected members long {[*landmarks.shape[:-1], k.shape[2]]}, got {members.dtype} "
            f"{tuple(members.shape)}."
        )
    if keys is not None:
        check_bool("keys", keys, (q.shape[0], k.shape[2]))
    tokens = landmarks
    if rows is not None:
        check_landmarks(rows, q)
        tokens = rows
    if bias is not None and removed is not None:
        raise ValueError("Expected no bias with removed tokens.")
    check_integer("exact_rows", exact_rows, least=0)
    if removed is not None:
        check_index("removed tokens", removed[0], "[b t]", below=k.shape[2])
        check_bool("removed tokens' validity", removed[1], tuple(removed[0].shape))
        if len(removed[0]) != len(q):
            raise ValueError(f"Expected removed tokens [{len(q)} t], got {len(removed[0])} rows.")
    if removed is None and (own or sunk):
        raise ValueError(f"Expected removed tokens with own={own} and sunk={sunk}, got None.")
    scale = default_scale(q) if scale is None else scale
    shared = members.ndim == tokens.ndim == 2 and min(landmarks.shape[1], tokens.shape[1]) > 0
    if bias is None and shared and q.shape == k.shape and on_cpu(k.shape[2], q, k, v):
        from fna_lab.ops.kernels import compiled

        found = compiled.clustered_attention(
            q, k, v, landmarks, members, rows, solver, scale=scale, keys=keys,
            exact_rows=exact_rows, removed=removed, own=own, sunk=sunk,
        )  # fmt: skip
        if found is not None:
            return found
    means, sizes = cluster_means(k, members, landmarks.shape[-1], runs=runs)
    sizes = each_head(sizes)
    distinct = keys is None if distinct is None else distinct
    dead = None if distinct else sizes == 0
    gone = None
    if rows is not None and (dead is not None or rows.shape[-1] > landmarks.shape[-1]):
        gone = repeated_landmarks(rows)  # more rows than landmarks may repeat some
    # A repeated landmark has no cluster: log 0 keeps everybody from it.
    columns = corner = sizes.log()[:, :, None]
    seen = None
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        seen = gather_tokens(bias, tokens)  # [b h r n]
        columns = columns + gather_tokens(bias.mT, landmarks).mT  # [b h n m]
        corner = gather_tokens(columns, tokens)  # [b h r m]
    if keys is not None:
        seen = only_keys(keys, seen)
    prior = gather_tokens(v, landmarks)
    apart = _Apart(k, v, removed) if removed is not None and (own or sunk) else None
    if apart and sunk:
        prior = prior.masked_fill(apart.holds(landmarks)[..., None], 0)
    out, exact, values = nystrom_chain(
        q,
        k,
        v,
        gather_tokens(q, tokens),
        means,
        solver,
        scale=scale,
        rows=seen,
        columns=columns,
        corner=corner,
        dead=dead,
        gone=gone,
        prior=prior,
        gather=apart.sunk if apart and sunk else None,
    )
    if exact_rows:
        out = put_tokens(out, tokens[..., :exact_rows], exact[:, :, :exact_rows])
    # Under `torch.compile` the number of rows is not known.
    if not (apart and own) or not torch.compiler.is_compiling() and apart.rows.shape[1] == 0:
        return out
    if sunk:  # they are in a cluster, and must not count twice
        home = each_head(members).gather(2, apart.rows[:, None].expand(-1, sizes.shape[1], -1))
        place = torch.arange(sizes.shape[2], device=q.device)
        columns = (sizes[:, :, None] - (home[..., None] == place).to(sizes.dtype)).log()
    return apart.seeing_themselves(out, q, means, values, columns, scale)


class _Apart:
    """Tokens T that a mask takes away, and what it leaves of them.

    Args:
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        removed: T as `token_rows` gives it.
    """

    def __init__(self, k: Tensor, v: Tensor, removed: tuple[Tensor, Tensor]) -> None:
        self.rows, self.valid = removed
        self.keys, self.values = gather_tokens(k, self.rows), gather_tokens(v, self.rows)

    def holds(self, landmarks: Tensor) -> Tensor:
        """Which landmarks are in T: bool `[b 1|h m]`."""
        same = each_head(landmarks)[..., None] == self.rows[:, None, None]
        return (same & self.valid[:, None, None]).any(-1)

    def seeing_themselves(
        self, out: Tensor, q: Tensor, means: Tensor, values: Tensor, columns: Tensor, scale: float
    ) -> Tensor:
        """`out` with T attending to clusters and to themselves: `[b h n d]`.

        Args:
            out: outputs of all tokens `[b h n d]`.
            q: queries `[b h n d]`.
            means: keys of the clusters `[b h m d]`.
            values: values of the clusters `[b h m d]`.
            columns: log of how many keys each cluster stands for, `[b 1|h 1|t m]`.
            scale: factor of the logits.
        """
        num = self.rows.shape[1]
        own = torch.eye(num, dtype=columns.dtype, device=q.device).log()
        shape = (*columns.shape[:2], num, -1)
        few = gather_tokens(q, self.rows)
        found = F.scaled_dot_product_attention(
            few,
            torch.cat([means, self.keys], dim=2),
            torch.cat([values, self.values], dim=2),
            attn_mask=torch.cat([columns.expand(shape), own.expand(shape)], dim=3).to(q.dtype),
            scale=scale,
        ).to(out.dtype)
        # Rows of a single picture have no padding, but where a compiler asked for some.
        if len(self.rows) > 1 or torch.compiler.is_compiling():
            now = gather_tokens(out, self.rows)
            found = torch.where(self.valid[:, None, :, None], found, now)
        return put_tokens(out, self.rows, found)

    def sunk(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention in which the values of T count as zero; called as SDPA is.

        What T hands out is taken off again, which needs no copy of the values.
        """
        out, lse = attention_with_lse(q, k, v, scale=scale, mask=attn_mask)
        wide = torch.promote_types(q.dtype, torch.float32)
        if lse is None:  # the kernel does not say
            logits, bias = attention_logits(q, k, scale), as_bias(attn_mask, wide)
            lse = (logits if bias is None else logits + bias).logsumexp(-1)
        logits = attention_logits(q, self.keys, scale)
        logits = logits.masked_fill(~self.valid[:, None, None], -torch.inf)
        with full_precision(q):
            taken = (logits - lse[..., None]).exp() @ self.values.to(wide)
        return out - taken.to(out.dtype)
