"""Random projections: distances in fewer dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float, check_integer
from fna_lab.ops.draws import drawn_once
from fna_lab.ops.kernels.switch import on_cpu


def sketch_points(points: Tensor, dims: int, *, normed: bool = False, groups: int = 1) -> Tensor:
    """Random projection, which keeps distances on average up to one factor.

    Args:
        points: `[b n c]`.
        dims: so many dimensions, of a Gaussian draw with seed 0.
        normed: project layer-normed points, without the affine part. That takes no copy of them:
            the mean falls to a draw without one, and the deviation is divided out after it.
        groups: cut the channels into so many runs and project each to its share of the
            dimensions, in so many times fewer operations. Where the runs differ alike from token
            to token, as those of keys do, distances scatter no more for it; where a few channels
            hold most of the differences, as in hidden states with massive activations, they do.

    Returns:
        `[b n dims]`, in at least float32.

    Raises:
        TypeError: `points` is not a floating tensor.
        ValueError: `points` is not `[b n c]`, `dims` is not positive, `groups` does not divide
            both c and `dims`, or there are groups of normed points.

    Source: Johnson and Lindenstrauss 1984.
    """
    check_float("points", points, 3, "[b n c]")
    check_integer("dims", dims)
    batch, tokens, channels = points.shape
    if type(groups) is not int or groups < 1 or channels % groups or dims % groups:
        raise ValueError(
            f"Expected groups to divide {channels} channels and {dims} dims, got {groups!r}."
        )
    if normed and groups > 1:
        raise ValueError(f"Expected groups=1 with normed points, got {groups!r}.")
    wide = torch.promote_types(points.dtype, torch.float32)
    if not normed and on_cpu(tokens, points):
        from fna_lab.ops.kernels import compiled

        return compiled.sketch_points(points, _grouped(channels, dims, groups))
    if groups > 1:
        runs = points.flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1)  # [g b*n c/g]
        found = torch.bmm(runs, _grouped(channels, dims, groups).to(points))
        return found.transpose(0, 1).reshape(batch, tokens, dims).to(wide)
    draw = _draw(channels, dims)
    if normed:
        draw = draw - draw.mean(0)
    found = (points @ draw.to(points)).to(wide)
    if not normed:
        return found
    norm = torch.linalg.vector_norm(points, dim=-1, keepdim=True, dtype=wide)
    mean = points.mean(-1, keepdim=True, dtype=wide)
    variance = norm.square().div_(channels).sub_(mean.square()).clamp_(min=0)
    return found.mul_(variance.add_(1e-5).rsqrt_())


@drawn_once
def _grouped(channels: int, dims: int, groups: int) -> Tensor:
    """A corner of the draw for each group, which has that many channels fewer to add up."""
    own = _draw(channels, dims)[: channels // groups].unflatten(1, (groups, -1)).transpose(0, 1)
    return (own * groups**0.5).contiguous()


@drawn_once
def _draw(channels: int, dims: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(channels, dims, generator=generator, device="cpu", dtype=torch.float32)
    return draw * channels**-0.5  # of the size of one channel: half precision holds it
