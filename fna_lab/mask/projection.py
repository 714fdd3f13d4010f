"""Projection correction: what other tokens take from a token's own direction is given back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.base import Mask
from fna_lab.settings import check_number


class ProjectionMask(Mask):
    """Adds to the attention's output; attention itself is not masked. Costs O(n^2 h).

    Args:
        pairs: the (query, key) pairs that are corrected, a name of `ops.PATTERNS`; `x_to_x` are
            all of them and need no detector.
        clamp: least projection that is left alone.
        order: `relu_sum` or `sum_relu`, see `ops.projection_correction`.
        **common: see `Mask`; `stage` says how tokens are taken out while blocks run again.

    Raises:
        ValueError: a setting is out of range.
    """

    corrects = True

    def __init__(
        self,
        *,
        pairs: str = "x_to_x",
        clamp: float = 0.0,
        order: str = "relu_sum",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.pairs = ops.check_pattern(pairs, "sink", "mask.pairs: ")
        if order not in ops.CORRECTIONS:
            known = " or ".join(ops.CORRECTIONS)
            raise ValueError(f"mask.order={order!r}: expected {known}.")
        check_number("mask.clamp", clamp, "a number")
        self.clamp = clamp
        self.order = order

    @property
    def looks(self) -> bool:
        """Whether tokens are looked for at all."""
        return self.pairs not in ops.WITHOUT_TOKENS

    def correct(
        self, weights: Tensor, x: Tensor, v: Tensor, out_weight: Tensor, tokens: Tensor
    ) -> Tensor:
        """What is added to the attention's output, `[b n c]`."""
        pairs = ops.removed_pairs(tokens, self.pairs)
        return ops.projection_correction(
            weights, x, v, out_weight, pairs, clamp=self.clamp, order=self.order
        )
