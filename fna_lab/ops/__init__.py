"""Tensor functions: attention, Nystroem attention, inverses, farthest points."""

from fna_lab.ops.attention import attention
from fna_lab.ops.nystrom import nystrom_attention
from fna_lab.ops.points import farthest_points
from fna_lab.ops.solvers import newton_schulz, ridge_solve

__all__ = [
    "attention",
    "farthest_points",
    "newton_schulz",
    "nystrom_attention",
    "ridge_solve",
]
