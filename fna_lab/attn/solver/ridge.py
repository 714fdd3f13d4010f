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
        self.inverse = ops.RidgeInverse(ridge)

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h r m]`, `[b h r d]` -> `[b h m d]`."""
        return self.inverse(kernel, values)

    def operator(self) -> ops.RidgeInverse:
        """What compiled kernels know."""
        return self.inverse

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head."""
        return ops.ridge_flops(rows, landmarks, head_dim)
