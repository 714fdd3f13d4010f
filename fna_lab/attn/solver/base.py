"""What every solver promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Solver(ABC):
    """Applies something like the inverse of the landmark kernel.

    Attributes:
        square: whether it needs as many rows as columns.
    """

    square: bool = False

    @abstractmethod
    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: kernel A `[b h r m]`, values B `[b h r d]` -> `[b h m d]`."""

    @abstractmethod
    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head, for a kernel of so many rows (queries) and landmarks."""


def check_solver(solver: object) -> None:
    """Raise unless it is a solver, or None.

    Raises:
        TypeError: naming the setting and its value.
    """
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"attn.solver={solver!r}: expected attn/solver=NAME on the command line, in Python a "
            "solver of fna_lab.attn.solver."
        )
