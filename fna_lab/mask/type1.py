"""Type I: nobody attends to the detected tokens."""

from __future__ import annotations

from fna_lab.mask.base import Mask


class Type1Mask(Mask):
    """Every row loses the columns of T, the tokens of T themselves included."""

    pattern = "type1"
