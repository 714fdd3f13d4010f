"""Truncated singular values: directions below a tolerance are dropped, not damped."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.base import Solver
from fna_lab.settings import check_number


class LeastSquaresSolver(Solver):
    """The minimum-norm least-squares solution with small singular values left out.

    Args:
        tolerance: least singular value that is kept, in units of the largest.

    Raises:
        ValueError: `tolerance` lies outside 0 to 1.
    """

    def __init__(self, *, tolerance: float = 1e-2) -> None:
        words = "a number from 0 up to, but not, 1"
        check_number("attn.solver.tolerance", tolerance, words, least=0, below=1)
        self.tolerance = tolerance

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h r m]`, `[b h r d]` -> `[b h m d]`."""
        return torch.linalg.pinv(kernel, rtol=self.tolerance) @ values

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head."""
        return ops.svd_flops(rows, landmarks, head_dim)
