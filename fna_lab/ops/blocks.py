"""Low-rank attention, block by block of token classes; for analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float, check_integer


def block_low_rank(pattern: Tensor, labels: Tensor, num: int, rank: int) -> Tensor:
    """Every (class, class) block of an attention pattern replaced by its best low-rank form.

    Takes O(num^2 n^3): a singular value decomposition of each block.

    Args:
        pattern: attention `[b h n n]`.
        labels: class of each token, long `[b n]`, from 0 to num - 1.
        num: number of classes.
        rank: singular values that each block keeps; from the block's smaller side on, it is exact.

    Returns:
        `[b h n n]`, in at least float32.

    Raises:
        NotImplementedError: a gradient is asked for; equal singular values have none.
        TypeError: `pattern` is not a floating tensor.
        ValueError: shapes do not fit, or `rank` < 1.

    Source: the compression study of Fast Nystroem Attention's companion; Eckart and Young 1936.
    """
    check_float("pattern", pattern, 4, "[b h n n]")
    if labels.shape != (pattern.shape[0], pattern.shape[2]):
        raise ValueError(f"Expected labels [b n], got {tuple(labels.shape)}.")
    check_integer("rank", rank)
    if torch.is_grad_enabled() and pattern.requires_grad:
        raise NotImplementedError(
            "block_low_rank (attn=block_svd) has no gradient where singular values are equal; "
            "expected torch.no_grad() around it."
        )
    pattern = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    found = torch.zeros_like(pattern)
    for row in range(num):
        for column in range(num):
            # Zero rows and columns change no singular value: classes of any size, in one batch.
            block = (labels == row)[:, None, :, None] & (labels == column)[:, None, None]
            u, s, vh = torch.linalg.svd(pattern * block, full_matrices=False)
            low = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
            found = found + low * block
    return found
