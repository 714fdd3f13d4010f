"""Nystroemformer without its training: landmarks are means of segments."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.layers import Counts
from fna_lab.attn.reduced import SegmentAttention
from fna_lab.attn.solver.base import Solver, check_solver
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver


class NystromformerAttention(SegmentAttention):
    """Nystroem attention whose landmark queries and keys are means of equal segments of tokens.

    Every prefix token is a segment of its own. The trained convolution of the original is left
    out: there is nothing to train here (Xiong et al. 2021).

    Args:
        num_landmarks: segments, prefix tokens included; one number, or one a block.
        solver: what stands for the inverse of A; None = the cubic iteration.

    Raises:
        ValueError: `num_landmarks` is neither a positive integer nor such numbers by block.
    """

    def __init__(self, *, num_landmarks: Counts = 64, solver: Solver | None = None) -> None:
        super().__init__(num_landmarks=num_landmarks)
        check_solver(solver)
        self.solver = solver or NewtonSchulzSolver()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        *,
        keys: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Attend through the means of segments."""
        members, num = self.segments(q, keys, context)
        runs = ops.cluster_runs(members, num)
        q_means, _ = ops.cluster_means(q, members, num, runs=runs)
        k_means, sizes = ops.cluster_means(k, members, num, runs=runs)
        rows = columns = corner = dead = None
        if bias is not None:
            pool = ops.averaging_weights(members, num, bias.dtype)[:, None]  # [b 1 m n]
            rows, columns = pool @ bias, bias @ pool.mT
            corner = rows @ pool.mT
        if keys is not None:
            dead = sizes == 0  # [b m]
            rows, columns = ops.only_keys(keys, rows), ops.only_keys(~dead, columns)
        out, *_ = ops.nystrom_chain(
            q,
            k,
            v,
            q_means,
            k_means,
            self.solver,
            scale=context.scale,
            rows=rows,
            columns=columns,
            corner=corner,
            dead=dead,
        )
        return out

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, the means included."""
        several = self.counts(layers)
        solves = [self.solver.flops(num, num, head_dim) for num in several]
        chains = sum(
            ops.nystrom_flops(tokens, heads, head_dim, num, solve=solve)
            for num, solve in zip(several, solves, strict=True)
        )
        return chains + layers * 2 * ops.mean_flops(tokens, channels)
