"""The ridge inverse (A'A + lambda I)^-1 A'."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.base import Solver
from fna_lab.settings import check_number


class RidgeSolver(Solver):
    """Least squares with a penalty, solved against the values: one Cholesky factor a head.

    Args:
        ridge: the penalty lambda.

    Raises:
        ValueError: `ridge` is not positive.
    """

    def __init__(self, *, ridge: float = 1e-3) -> None:
        check_number("attn.solver.ridge", ridge, "a number > 0", above=0)
        self.ridge = ridge

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h r m]`, `[b h r d]` -> `[b h m d]`."""
        return ops.ridge_solve(kernel, values, self.ridge)

    @property
    def kernel_ridge(self) -> float | None:
        """The penalty, for kernels that solve it themselves; None where a subclass solves more."""
        return self.ridge if type(self).__call__ is RidgeSolver.__call__ else None

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head."""
        return ops.ridge_flops(rows, landmarks, head_dim)
