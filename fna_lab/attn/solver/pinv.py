"""The Moore-Penrose inverse, by singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.solver.base import Solver


class PinvSolver(Solver):
    """Exact up to rounding, and therefore no good in float32 on an ill-conditioned kernel."""

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Z(A) B: `[b h r m]`, `[b h r d]` -> `[b h m d]`."""
        return torch.linalg.pinv(kernel) @ values

    def flops(self, rows: int, landmarks: int, head_dim: int) -> int:
        """FLOPs of one head."""
        return ops.svd_flops(rows, landmarks, head_dim)
