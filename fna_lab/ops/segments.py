"""Equal segments of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_members(
    tokens: int, num: int, *, prefix: int = 0, device: torch.device | None = None
) -> Tensor:
    """The segment of each token: every prefix token its own, equal ones of the rest.

    Of the N patch tokens, with m segments and L = N // m, the first (L + 1) m - N segments hold
    L tokens, the others L + 1.

    Args:
        tokens: number of tokens n.
        num: number of segments, prefix tokens included.
        prefix: tokens that are segments of their own.
        device: of the result.

    Returns:
        Long `[n]`, 0 to num - 1, ascending; see `cluster_means` for means over them.

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
    place = torch.arange(patches, device=device)
    long = (place - short).div(length + 1, rounding_mode="floor") + short // length
    segment = torch.where(place < short, place.div(length, rounding_mode="floor"), long)
    return torch.cat([torch.arange(prefix, device=device), segment + prefix])


def averaging_weights(members: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Averages over clusters as a matrix, for a bias that heads or pictures share.

    Args:
        members: the cluster of each token, long `[b n]`, 0 to num - 1; -1 = none.
        num: number of clusters m.
        dtype: of the weights.

    Returns:
        `[b m n]`; a cluster without a token is a row of zeros.
    """
    held = members[:, None] == torch.arange(num, device=members.device)[:, None]
    held = held.to(dtype)
    return held / held.sum(-1, keepdim=True).clamp(min=1)
