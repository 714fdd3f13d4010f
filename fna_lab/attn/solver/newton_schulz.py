"""The published cubic iteration."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.base import Solver
from fna_lab.settings import check_integer


class NewtonSchulzSolver(Solver):
    """A few steps of a cubic iteration, which regularise: more of them is not better.

    Args:
        iters: number of steps.

    Raises:
        ValueError: `iters` is negative.
    """

    square = True

    def __init__(self, *, iters: int = 6) -> None:
        check_integer("attn.solver.iters", iters, least=0)
        self.iters = iters

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h m m]`, `[b h m d]` -> `[b h m d]`."""
        return ops.newton_schulz(kernel, self.iters) @ values

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:  # noqa: ARG002 (square)
        """FLOPs of one head."""
        return ops.newton_schulz_flops(landmarks, head_dim, self.iters)
