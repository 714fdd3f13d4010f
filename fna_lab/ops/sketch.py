"""Random projections: distances in fewer dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float


def sketch_points(points: Tensor, dims: int, *, normed: bool = False) -> Tensor:
    """Random projection, which keeps distances on average up to one factor.

    Args:
        points: `[b n c]`.
        dims: so many dimensions, of a Gaussian draw with seed 0.
        normed: project layer-normed points, without the affine part. That takes no copy of them:
            the mean falls to a draw without one, and the deviation is divided out behind it.

    Returns:
        `[b n dims]`, in at least float32.

    Raises:
        TypeError: `points` is not a floating tensor.
        ValueError: `points` is not `[b n c]`, or `dims` is not positive.

    Source: Johnson and Lindenstrauss 1984.
    """
    check_float("points", points, 3, "[b n c]")
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < 1:
        raise ValueError(f"Expected dims to be an integer >= 1, got {dims!r}.")
    channels = points.shape[2]
    draw = _draw(channels, dims)
    if normed:
        draw = draw - draw.mean(0)
    wide = torch.promote_types(points.dtype, torch.float32)
    found = (points @ draw.to(points)).to(wide)
    if not normed:
        return found
    norm = torch.linalg.vector_norm(points, dim=-1, keepdim=True, dtype=wide)
    mean = points.mean(-1, keepdim=True, dtype=wide)
    variance = norm.square().div_(channels).sub_(mean.square()).clamp_(min=0)
    return found.mul_(variance.add_(1e-5).rsqrt_())


@torch.compiler.assume_constant_result  # a traced graph may not make a generator of its own
def _draw(channels: int, dims: int) -> Tensor:
    draw = torch.randn(channels, dims, generator=torch.Generator().manual_seed(0))
    return draw * channels**-0.5  # of the size of one channel: half precision holds it
