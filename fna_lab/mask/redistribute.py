"""Weight redistribution: a part of the detected tokens' attention goes to other patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.base import Mask
from fna_lab.settings import check_number


class RedistributeMask(Mask):
    """Writes attention out (`attn=exact` only), and moves weight from T to the other patches.

    Args:
        keep: part of its weight that T keeps.
        max_share: rows in which T has more than that of the patches' attention stay as they are.
        min_patches: rows in which the patches have less attention than that stay as they are.
        **common: see `Mask`; `stage` says how tokens are taken out while blocks run again.

    Raises:
        ValueError: a share lies outside 0 to 1.
    """

    reweighs = True

    def __init__(
        self,
        *,
        keep: float = 0.6,
        max_share: float = 0.5,
        min_patches: float = 0.2,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        shares = {"keep": keep, "max_share": max_share, "min_patches": min_patches}
        for name, value in shares.items():
            check_number(f"mask.{name}", value, "a number from 0 to 1", least=0, most=1)
        self.shares = shares

    def reweigh(self, weights: Tensor, tokens: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """New attention weights `[b h n n]`."""
        return ops.redistribute(weights, tokens, prefix=num_prefix_tokens, **self.shares)
