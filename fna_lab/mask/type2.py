"""Type II: nobody attends to the detected tokens, but each of them still sees itself."""

from __future__ import annotations

from fna_lab.mask.base import Mask


class Type2Mask(Mask):
    """Every row loses the columns of T, except for T's own diagonal."""

    pattern = "type2"
