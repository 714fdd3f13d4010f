"""Token replacement: other tokens in the place of the detected ones, which may move behind all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.base import Mask


class ReplaceMask(Mask):
    """Changes the input of the first masked block; attention itself is not masked.

    With a concatenation the median neighbour stands in for the detected tokens, and behind the
    others the detected ones (or what is made of them) go on as registers, up to the last block.

    Args:
        how: `mean`, `permutation` or `median`, see `ops.replace_tokens`; `concatenation`,
            `mean_concatenation` or `permutation_concatenation`, see `ops.moved_tokens`.
        window: side of the window of `median` and the concatenations, in patches.
        seed: of the draw of `permutation` and `permutation_concatenation`.
        **common: see `Mask`; `stage` says how tokens are taken out while blocks run again.

    Raises:
        ValueError: a setting is out of range.
    """

    rewrites = True

    def __init__(
        self, *, how: str = "mean", window: int = 7, seed: int = 0, **common: Any
    ) -> None:
        super().__init__(**common)
        known = (*ops.REPLACEMENTS, *ops.MOVES)
        if how not in known:
            raise ValueError(f"mask.how={how!r}: expected one of {', '.join(known)}.")
        if type(window) is not int or window < 1 or window % 2 == 0:
            raise ValueError(f"mask.window={window!r}: expected an odd integer >= 1.")
        if type(seed) is not int:
            raise ValueError(f"mask.seed={seed!r}: expected an integer.")
        self.how = how
        self.appends = how in ops.MOVES
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
            ValueError: `median` and the concatenations need the patch grid, and the host shows
                none.
        """
        how = "median" if self.appends else self.how
        if how == "median" and grid is None:
            raise ValueError(
                f"mask.how={self.how!r} needs the patch grid, which this host does not show; use "
                "mask.how=mean."
            )
        return ops.replace_tokens(
            x,
            tokens,
            how,
            prefix=num_prefix_tokens,
            grid=grid,
            window=self.window,
            seed=self.seed,
            kept=kept,
        )

    def appended(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The moved tokens `[b t c]`, and bool `[b t]`, False where they are padding."""
        return ops.moved_tokens(x, tokens, self.how, seed=self.seed)
