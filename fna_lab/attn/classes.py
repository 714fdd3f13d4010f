"""Token classes by name, as settings say them and as tokens of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fna_lab.attn.base import Context

PREFIX = ("cls", "register")
DETECTED = ("massive", "artifact")


def read_classes(setting: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Token classes of a setting, checked; one name may stand without its list.

    Raises:
        ValueError: a class does not exist.
    """
    known = PREFIX + DETECTED
    found = (classes,) if isinstance(classes, str) else tuple(classes or ())
    if any(name not in known for name in found):
        raise ValueError(f"{setting}={list(found)}: expected classes among {', '.join(known)}.")
    return found


def prefix_tokens(classes: Sequence[str], context: Context) -> range:
    """Indices of the prefix tokens of these classes."""
    cls, prefix = int(context.has_cls), context.num_prefix_tokens
    return range(0 if "cls" in classes else cls, prefix if "register" in classes else cls)


def token_set(classes: Sequence[str], batch: int, size: int, context: Context) -> Tensor:
    """The tokens of some classes, bool `[batch size]`.

    Raises:
        ValueError: a class had to be detected, and nobody did.
    """
    given = prefix_tokens(classes, context)
    place = torch.arange(size, device=context.x.device)
    found = ((place >= given.start) & (place < given.stop)).expand(batch, -1)
    for name in DETECTED:
        if name not in classes:
            continue
        if name not in context.classes:
            raise ValueError(
                f"Token class {name!r} is not known at block {context.layer}: nobody looked for "
                "it in this forward pass."
            )
        found = found | context.classes[name]
    return found
