"""Truncated singular values: directions below a tolerance are dropped, not damped."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.base import Solver


class LeastSquaresSolver(Solver):
    """The minimum-norm least-squares solution with small singular values left out.

    Args:
        tolerance: least singular value that is kept, in units of the largest.

    Raises:
        ValueError: `tolerance` lies outside 0 to 1.
    """

    def __init__(self, *, tolerance: float = 1e-2) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"attn.solver.tolerance={tolerance}: expected a number from 0 to 1.")
        self.tolerance = tolerance

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h r m]`, `[b h r d]` -> `[b h m d]`."""
        return torch.linalg.pinv(kernel, rtol=self.tolerance) @ values

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head."""
        return ops.svd_flops(rows, landmarks, head_dim)
