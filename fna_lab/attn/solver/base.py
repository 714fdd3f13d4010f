"""What every solver promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Solver(ABC):
    """Applies something like the inverse of the landmark kernel.

    Attributes:
        formula: the name under which `ops.nystrom_flops` knows its cost.
    """

    formula: str

    @abstractmethod
    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: kernel A `[b h m m]`, values B `[b h m d]` -> `[b h m d]`."""
