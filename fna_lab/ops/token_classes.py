"""The class of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool

# A class is its place in this tuple.
TOKEN_CLASSES = ("cls", "register", "massive", "artifact", "normal")


def token_classes(
    massive: Tensor, artifact: Tensor | None = None, *, prefix: int = 1, has_cls: bool = True
) -> Tensor:
    """What each token is, from what detectors found; massive before artifact.

    Args:
        massive: tokens that a detector of massive tokens found, bool `[b n]`.
        artifact: tokens that a detector of artifacts or sinks found; None = nobody looked.
        prefix: number of prefix tokens, which are CLS and registers whatever was found.
        has_cls: whether token 0 is CLS; the other prefix tokens are registers.

    Returns:
        Long `[b n]`, places in `TOKEN_CLASSES`.

    Raises:
        TypeError: a set is no bool tensor.
        ValueError: shapes do not fit, or there is a CLS without prefix tokens.
    """
    check_bool("massive", massive, tuple(massive.shape))
    if massive.ndim != 2:
        raise ValueError(f"Expected massive to have shape [b n], got {tuple(massive.shape)}.")
    if not 0 <= prefix <= massive.shape[1] or (has_cls and prefix < 1):
        raise ValueError(
            f"Expected prefix to be from {int(has_cls)} to {massive.shape[1]}, got {prefix!r}."
        )
    cls, register, heavy, odd, normal = range(len(TOKEN_CLASSES))
    classes = torch.full(massive.shape, normal, dtype=torch.long, device=massive.device)
    if artifact is not None:
        check_bool("artifact", artifact, tuple(massive.shape))
        classes.masked_fill_(artifact, odd)
    classes.masked_fill_(massive, heavy)
    classes[:, :prefix] = register
    if has_cls:
        classes[:, 0] = cls
    return classes
