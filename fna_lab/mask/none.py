"""No mask: every token may attend to every other."""

from __future__ import annotations

from fna_lab.mask.base import Mask


class NoMask(Mask):
    """Leaves attention as it is, and looks for no tokens."""

    pattern = None

    def __init__(self) -> None:
        super().__init__()
