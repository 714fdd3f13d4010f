"""Token replacement: other tokens are put in the place of the detected ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.base import Mask


class ReplaceMask(Mask):
    """Changes the input of the first masked block; attention itself is not masked.

    Args:
        how: `mean`, `permutation` or `median`, see `ops.replace_tokens`.
        window: side of the window of `median`, in patches.
        seed: of the draw of `permutation`.
        **common: see `Mask`; `stage` says how tokens are taken out while blocks run again.

    Raises:
        ValueError: a setting is out of range.
    """

    rewrites = True

    def __init__(
        self, *, how: str = "mean", window: int = 7, seed: int = 0, **common: Any
    ) -> None:
        super().__init__(**common)
        if how not in ops.REPLACEMENTS:
            raise ValueError(f"mask.how={how!r}: expected one of {', '.join(ops.REPLACEMENTS)}.")
        if type(window) is not int or window < 1 or window % 2 == 0:
            raise ValueError(f"mask.window={window!r}: expected an odd integer >= 1.")
        if type(seed) is not int:
            raise ValueError(f"mask.seed={seed!r}: expected an integer.")
        self.how = how
        self.window = window
        self.seed = seed

    def rewrite(
        self,
        x: Tensor,
        tokens: Tensor,
        *,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """New hidden states `[b n c]`.

        Raises:
            ValueError: `median` needs the patch grid, and the host shows none.
        """
        if self.how == "median" and grid is None:
            raise ValueError(
                "mask.how='median' needs the patch grid, which this host does not show; use "
                "mask.how=mean."
            )
        return ops.replace_tokens(
            x,
            tokens,
            self.how,
            prefix=num_prefix_tokens,
            grid=grid,
            window=self.window,
            seed=self.seed,
            kept=kept,
        )
