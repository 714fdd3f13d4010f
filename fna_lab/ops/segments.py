"""Means over segments of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_weights(
    tokens: int, num: int, *, prefix: int = 0, keys: Tensor | None = None, like: Tensor
) -> Tensor:
    """Rows that average segments of tokens: every prefix token its own, equal ones of the rest.

    Of the N patch tokens, with m segments and L = N // m, the first (L + 1) m - N segments hold
    L tokens, the others L + 1.

    Args:
        tokens: number of tokens n.
        num: number of segments, prefix tokens included.
        prefix: tokens that are segments of their own.
        keys: bool `[b n]`, False = in no mean; None = all are.
        like: gives the device and dtype.

    Returns:
        `[1 num n]`, or `[b num n]` with `keys`; a segment without a kept token is a row of zeros.

    Raises:
        ValueError: there are not as many tokens as segments, or only prefix tokens would fit.

    Source: Xiong et al. 2021 (Nystroemformer); the remainder as in its T2T-ViT code.
    """
    patches, parts = tokens - prefix, num - prefix
    if not 1 <= parts <= patches:
        raise ValueError(
            f"Expected num from {prefix + 1} to {tokens} segments ({prefix} prefix tokens), "
            f"got {num}."
        )
    length = patches // parts
    short = ((length + 1) * parts - patches) * length  # tokens in the short segments
    place = torch.arange(patches, device=like.device)
    long = (place - short).div(length + 1, rounding_mode="floor") + short // length
    segment = torch.where(place < short, place.div(length, rounding_mode="floor"), long)
    segment = torch.cat([torch.arange(prefix, device=like.device), segment + prefix])
    weights = (segment == torch.arange(num, device=like.device)[:, None]).to(like.dtype)[None]
    if keys is not None:
        weights = weights * keys[:, None].to(like.dtype)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)
