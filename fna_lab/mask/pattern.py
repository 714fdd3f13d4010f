"""Any of the nine patterns of (query, key) pairs, for analysis."""

from __future__ import annotations

from typing import Any

from fna_lab.mask.base import Mask
from fna_lab.ops import check_pattern


class PatternMask(Mask):
    """Takes the pairs of a named pattern of T away.

    Args:
        pattern: a name of `ops.PATTERNS`.
        **common: see `Mask`.

    Raises:
        ValueError: the pattern is unknown, or would leave whole rows without a key.
    """

    def __init__(self, *, pattern: str = "t_to_t", **common: Any) -> None:
        super().__init__(**common)
        self.pattern = check_pattern(pattern, self.stage, "mask.")
