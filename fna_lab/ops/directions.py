"""Directions along which massive tokens lie: of a picture, or of the weights alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float


def principal_projection(
    x: Tensor, allowed: Tensor, direction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens along the first principal direction of their picture, and their typical length.

    The mean of the allowed tokens is taken off first. The picture's own direction points towards
    the token that lies farthest along it; a given direction keeps its sign.

    Args:
        x: hidden states `[b n c]`.
        allowed: the tokens that mean and direction are taken from, bool `[b n]`.
        direction: `[c]` instead of the picture's own, of any length.

    Returns:
        The projections `[b n]`, and the median length of the demeaned allowed tokens `[b 1]`,
        both in at least float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: after the projection heuristic of Fast Nystroem Attention's companion study, which
    takes one direction for a whole batch.
    """
    check_float("x", x, 3, "[b n c]")
    check_bool("allowed", allowed, tuple(x.shape[:2]))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    within = allowed[..., None]
    mean = x.masked_fill(~within, 0.0).sum(1, keepdim=True)
    x = x - mean / within.sum(1, keepdim=True).clamp(min=1)
    kept = x.masked_fill(~within, 0.0)
    lengths = kept.norm(dim=-1).masked_fill(~allowed, torch.nan)
    typical = lengths.nanmedian(1, keepdim=True).values
    if direction is not None:
        unit = _unit("direction", direction, x.shape[2]).to(x)
        return x @ unit, typical
    # eigh of the smaller Gram matrix in double precision: it squares the singular values.
    kept = kept.double()
    if x.shape[1] < x.shape[2]:
        vectors = torch.linalg.eigh(kept @ kept.mT)[1][..., -1:]
        axis = kept.mT @ vectors
    else:
        axis = torch.linalg.eigh(kept.mT @ kept)[1][..., -1:]
    axis = axis / axis.norm(dim=1, keepdim=True).clamp(min=1e-30)
    along = (kept @ axis)[..., 0]  # [b n]
    farthest = along.gather(1, along.abs().argmax(1, keepdim=True))
    sign = torch.where(farthest < 0, -1.0, 1.0)
    return (along * sign).to(x.dtype), typical


def linear_map(x: Tensor, y: Tensor) -> Tensor:
    """The linear map, beside an offset, that carries x to y best by least squares.

    Args:
        x: inputs `[s c]`, more of them than channels.
        y: outputs `[s c]`.

    Returns:
        `[c c]` in double precision; y is about map @ x.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit, or there are too few inputs.
    """
    check_float("x", x, 2, "[s c]")
    check_float("y", y, 2, "[s c]")
    if x.shape != y.shape or x.shape[0] <= x.shape[1]:
        raise ValueError(
            f"Expected x and y to be [s c] with s > c, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.solve(x.mT @ x, x.mT @ y).mT


def defect_direction(maps: Iterable[Tensor]) -> Tensor:
    """First left singular vector of a product of maps: where a stack of blocks pushes most.

    Args:
        maps: `[c c]` each, the first block's first; the product is last @ ... @ first.

    Returns:
        `[c]`, a unit vector, in double precision; its sign means nothing.

    Raises:
        TypeError: a map is not a floating tensor.
        ValueError: there is none, or shapes do not fit.

    Source: Wang et al. 2024, "SINDER: Repairing the Singular Defects of DINOv2", section 3.
    """
    product: Tensor | None = None
    for one in maps:
        check_float("maps", one, 2, "[c c]")
        if one.shape != (one.shape[0], one.shape[0]):
            raise ValueError(f"Expected maps to be square, got {tuple(one.shape)}.")
        product = one.double() if product is None else one.double() @ product
        product = product / product.norm()  # only the direction counts; no overflow
    if product is None:
        raise ValueError("Expected at least one map, got none.")
    return torch.linalg.eigh(product @ product.mT)[1][:, -1]


def alignment(x: Tensor, direction: Tensor) -> Tensor:
    """|cos| between each token and a direction.

    Args:
        x: hidden states `[b n c]`.
        direction: `[c]`, of any length.

    Returns:
        `[b n]`, from 0 to 1, in at least float32; a zero direction or token gives 0.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit.
    """
    check_float("x", x, 3, "[b n c]")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = _unit("direction", direction, x.shape[2]).to(x)
    return (x @ unit).abs() / x.norm(dim=-1).clamp(min=1e-30)


def _unit(name: str, direction: Tensor, channels: int) -> Tensor:
    check_float(name, direction, 1, "[c]")
    if direction.shape[0] != channels:
        raise ValueError(f"Expected {name} to have {channels} channels, got {direction.shape[0]}.")
    wide = direction.double()
    return wide / wide.norm().clamp(min=1e-30)
