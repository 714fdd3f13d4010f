"""Normalised cuts: eigenvectors of the affinity between tokens, and what is read off them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float
from fna_lab.ops.points import farthest_points
from fna_lab.ops.spread import gather_rows

# Random dimensions in which the samples of a Nystroem approximation are spread out.
SKETCH = 32
# Eigenvalues of the samples' affinity below this share of the largest are taken for 0.
CUTOFF = 1e-10


class Cut(NamedTuple):
    """The eigenvectors of a normalised cut, in double precision.

    Attributes:
        vectors: `[b n k]`, each of length 1 over the tokens of its set; 0 for tokens left out.
        values: `[b k]`, in descending order, from 1 to 0.
        degree: the affinity of each token to all, itself included, `[b n]`; 0 for tokens left out.
    """

    vectors: Tensor
    values: Tensor
    degree: Tensor


def normalized_cut(
    x: Tensor,
    num: int = 10,
    *,
    samples: int | None = None,
    bandwidth: Tensor | float | None = None,
    allowed: Tensor | None = None,
) -> Cut:
    """First eigenvectors u of D^-1/2 W D^-1/2, W[i, j] = exp(-|x_i - x_j|^2 / 2 s^2), D = W 1.

    D^-1/2 u solves the generalised problem (D - W) y = (1 - value) D y of Shi and Malik. Its first
    solution is a constant, of value 1: the first u, D^1/2 1 in units of its length, is written
    down and not computed, so that it stays first where W falls into pieces.

    Scale: an eigenvector has length 1 over the n tokens of its set, as published, so that its
    entries shrink with the set: their root mean square is n^-1/2. Thresholds of sets of different
    size are comparable in root mean squares: 0.015 over 12,850 tokens is 1.70 of them.
    Sign: the entry of largest size is positive, so that a group of few tokens is positive and the
    many are negative. Vectors of equal value are mixed at will, but alike for the same tokens.

    With `samples` < n, W is approximated by C A^+ C', where C holds the affinities to farthest
    points and A theirs among each other (Nystroem). The eigenvectors are then those of the
    approximation, orthonormal over all tokens, in O(n samples c + n samples^2).

    Args:
        x: tokens `[b n c]`; every set of the batch is cut on its own.
        num: how many eigenvectors, the first included, 1 to n (to `samples`).
        samples: most tokens that stand for all; None, or as many as there are tokens = exact,
            in O(n^2 c + n^3).
        bandwidth: s, a number or one for each set, `[b]`; None = `rbf_bandwidth(x, allowed)`.
        allowed: tokens that take part, bool `[b n]`; None = all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Shi and Malik 2000, equation 11; Fowlkes et al. 2004, section 3; Yang et al. 2024 for
    farthest points as samples and the bandwidth.
    """
    check_float("x", x, 3, "[b n c]")
    size = x.shape[1]
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ValueError(f"Expected samples to be an integer >= 1 or None, got {samples!r}.")
    most = size if samples is None else min(samples, size)
    if type(num) is not int or not 1 <= num <= most:
        raise ValueError(f"Expected num to be an integer from 1 to {most}, got {num!r}.")
    if allowed is None:
        allowed = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    check_bool("allowed", allowed, tuple(x.shape[:2]))
    scale = _scale(x, allowed, bandwidth)
    x = x.double()
    if most == size:
        first, vectors, values, degree = _exact(x, scale, allowed)
    else:
        chosen = farthest_points(x.float(), most, allowed=allowed, sketch=SKETCH)
        first, vectors, values, degree = _sampled(x, scale, allowed, chosen)
    vectors = vectors.flip(-1)[..., : num - 1].masked_fill(~allowed[..., None], 0.0)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = torch.cat([first, vectors * torch.where(largest < 0, -1.0, 1.0)], dim=2)
    values = F.pad(values.flip(-1)[:, : num - 1].clamp(0, 1), (1, 0), value=1.0)
    return Cut(vectors, values, degree)


def rbf_bandwidth(x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """A robust standard deviation of the tokens of each set, all channels together: `[b]`.

    A quarter of the range that holds the middle 95.4 % of a channel, which is four deviations of
    a normal distribution; the root of the sum of squares over the channels. A few massive tokens
    do not change it. Where most tokens are equal, and it is 0, the plain deviation stands in, and
    1 where all are.

    Args:
        x: tokens `[b n c]`.
        allowed: tokens that take part, bool `[b n]`; None = all.

    Returns:
        In double precision.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: the public package nystrom_ncut (Yang et al. 2024), which takes it of the samples
    alone.
    """
    check_float("x", x, 3, "[b n c]")
    if allowed is None:
        allowed = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    check_bool("allowed", allowed, tuple(x.shape[:2]))
    x = x.double()
    within = allowed[..., None]
    count = allowed.sum(1)[:, None, None].clamp(min=1)
    ordered = x.masked_fill(~within, torch.inf).sort(1).values
    ends = []
    for share in (0.5 - 0.5 * math.erf(2**0.5), 0.5 + 0.5 * math.erf(2**0.5)):
        place = share * (count - 1).double()
        low = place.long()
        at = [
            ordered.gather(1, index.expand(-1, -1, x.shape[2]))
            for index in (low, torch.minimum(low + 1, count - 1))
        ]
        ends.append(torch.lerp(at[0], at[1], place - low))
    robust = (ends[1] - ends[0]).norm(dim=2)[:, 0] / 4
    mean = x.masked_fill(~within, 0.0).sum(1, keepdim=True) / count
    spread = (x - mean).masked_fill(~within, 0.0).square().sum((1, 2)) / count[:, 0, 0]
    plain = spread.sqrt()
    tiny = 1e-9 * mean.norm(dim=2)[:, 0]
    found = torch.where(robust > tiny, robust, plain).nan_to_num(0.0)
    return torch.where(found > tiny, found, 1.0)


def extend_cut(x: Tensor, cut: Cut, reference: Tensor, bandwidth: Tensor | float) -> Tensor:
    """Where other tokens lie on the eigenvectors of a reference set; that set stays as it is.

    u(t) = sum_r W[t, r] (d_t d_r)^-1/2 u_r / value, with d_t = sum_r W[t, r]. A token of the
    reference gets its own entry back.

    Args:
        x: tokens `[b n c]`.
        cut: of the reference, a batch of one, with values above 0.
        reference: its tokens `[1 m c]`.
        bandwidth: with which it was cut.

    Returns:
        `[b n k]` in double precision, on the scale of the m reference tokens. A token out of reach
        of all of them gets 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the bandwidth is not > 0.

    Source: Nystroem's extension, Fowlkes et al. 2004, section 3.
    """
    check_float("x", x, 3, "[b n c]")
    check_float("reference", reference, 3, "[1 m c]")
    if reference.shape[0] != 1 or reference.shape[2] != x.shape[2]:
        raise ValueError(
            f"Expected reference to be [1 m {x.shape[2]}], got {tuple(reference.shape)}."
        )
    if cut.vectors.shape[:2] != reference.shape[:2]:
        raise ValueError(
            f"Expected cut to be of the {reference.shape[1]} reference tokens, got vectors "
            f"{tuple(cut.vectors.shape)}."
        )
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    scale = _scale(x, everything, bandwidth)
    fixed = reference.to(x.device, torch.double)
    weights = _affinity(x.double(), fixed, scale, everything, None)
    inverse = _inverse_root(weights.sum(2))[..., None]
    known = cut.vectors * _inverse_root(cut.degree)[..., None]
    return inverse * (weights @ (known / cut.values.clamp(min=1e-12)[:, None]).to(weights))


def align_axes(vectors: Tensor, *, allowed: Tensor | None = None, steps: int = 30) -> Tensor:
    """Eigenvectors turned so that every token lies near one axis: soft members of k groups.

    Rows are set to length 1. The first axis is the first allowed token's row, each further one
    the row least aligned with those before; then, in turn, every token goes to its nearest axis
    and the rotation that fits best follows, `steps` times.

    Args:
        vectors: eigenvectors of a cut `[b n k]`.
        allowed: tokens that take part, bool `[b n]`; None = all.
        steps: most turns.

    Returns:
        `[b n k]`, the cosine of each token with each axis; 0 for tokens left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Yu and Shi 2003, "Multiclass Spectral Clustering", figure 3.
    """
    check_float("vectors", vectors, 3, "[b n k]")
    if type(steps) is not int or steps < 0:
        raise ValueError(f"Expected steps to be an integer >= 0, got {steps!r}.")
    rows = vectors / vectors.norm(dim=2, keepdim=True).clamp(min=1e-30)
    if allowed is None:
        allowed = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    check_bool("allowed", allowed, tuple(vectors.shape[:2]))
    rows = rows.masked_fill(~allowed[..., None], 0.0)
    count = rows.shape[2]
    taken = torch.zeros_like(rows[..., 0]).masked_fill(~allowed, torch.inf)
    pick = allowed.int().argmax(1, keepdim=True)
    axes = []
    for _ in range(count):
        axis = rows.gather(1, pick[..., None].expand(-1, -1, count))
        axes.append(axis)
        taken = (taken + (rows @ axis.mT)[..., 0].abs()).scatter(1, pick, torch.inf)
        pick = taken.argmin(1, keepdim=True)
    turn = torch.cat(axes, dim=1).mT  # [b k k], an axis a column
    for _ in range(steps):
        member = (rows @ turn).argmax(2)
        gathered = torch.zeros_like(turn).scatter_add_(
            1, member[..., None].expand(-1, -1, count), rows
        )
        left, _, right = torch.linalg.svd(gathered.mT, full_matrices=False)
        turn = left @ right
    return rows @ turn


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _exact(x: Tensor, scale: Tensor, allowed: Tensor) -> Parts:
    """First vector `[b n 1]`, the others and their values in ascending order, degrees `[b n]`."""
    affinity = _affinity(x, x, scale, allowed, allowed)
    degree = affinity.sum(2)
    inverse, first = _inverse_root(degree), _first(degree)
    affinity = inverse[..., None] * affinity * inverse[:, None]
    values, vectors = torch.linalg.eigh(affinity - first * first.mT)
    return first, vectors, values, degree


def _sampled(x: Tensor, scale: Tensor, allowed: Tensor, chosen: Tensor) -> Parts:
    """The same of C A^+ C', where A are the affinities of the chosen tokens, long `[b m]`."""
    anchors = gather_rows(x, chosen)
    there = allowed.gather(1, chosen)
    factor = _affinity(x, anchors, scale, allowed, there)
    factor = factor @ _half_inverse(_affinity(anchors, anchors, scale, there, there))
    degree = (factor @ factor.sum(1)[..., None])[..., 0]
    # No true row sums up to less than its own diagonal; an approximate one may.
    degree = torch.maximum(degree, factor.square().sum(2))
    first = _first(degree)
    factor = _inverse_root(degree)[..., None] * factor
    factor = factor - first @ (first.mT @ factor)
    # Eigenvectors of F F' from the smaller F' F.
    values, vectors = torch.linalg.eigh(factor.mT @ factor)
    vectors = factor @ vectors
    return first, vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30), values, degree


def _scale(x: Tensor, allowed: Tensor, bandwidth: Tensor | float | None) -> Tensor:
    """1 / 2 s^2 of every set, `[b 1 1]`."""
    if bandwidth is None:
        found = rbf_bandwidth(x, allowed)
    else:
        found = torch.as_tensor(bandwidth, dtype=torch.double, device=x.device)
        if found.shape not in ((), (1,), (x.shape[0],)):
            raise ValueError(
                f"Expected bandwidth to be a number or [{x.shape[0]}], got {tuple(found.shape)}."
            )
        if isinstance(bandwidth, int | float) and not bandwidth > 0:
            raise ValueError(f"Expected bandwidth to be > 0, got {bandwidth!r}.")
        found = found.expand(x.shape[0])
    return (0.5 / found.square())[:, None, None]


def _affinity(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    """W `[b n m]` between `[b n c]` and `[b m c]`, 0 where a token takes no part."""
    centre = y.mean(1, keepdim=True)  # small numbers lose less in |x|^2 - 2 x y + |y|^2
    x, y = x - centre, y - centre
    square = x.square().sum(2)[..., None] + y.square().sum(2)[:, None] - 2 * x @ y.mT
    found = (-scale * square.clamp_(min=0)).exp_().masked_fill_(~rows[..., None], 0.0)
    return found if columns is None else found.masked_fill_(~columns[:, None], 0.0)


def _inverse_root(degree: Tensor) -> Tensor:
    """d^-1/2, 0 where d is 0."""
    return torch.where(degree > 0, degree, torch.inf).rsqrt()


def _first(degree: Tensor) -> Tensor:
    """D^1/2 1 in units of its length: `[b n 1]`."""
    root = degree.clamp(min=0).sqrt()[..., None]
    return root / root.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _half_inverse(affinity: Tensor) -> Tensor:
    """A with A A' the pseudo-inverse of a symmetric matrix `[b m m]`."""
    values, vectors = torch.linalg.eigh(affinity)
    known = values > CUTOFF * values[:, -1:]
    root = torch.where(known, values, torch.inf).rsqrt()
    return vectors * root[:, None]
