"""Fast Nystroem Attention with the parts that measure best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, LandmarkAttention
from fna_lab.attn.guard import Guard
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.layers import Counts
from fna_lab.attn.solver.base import Solver
from fna_lab.attn.solver.ridge import RidgeSolver


class FastNystromAttention(LandmarkAttention):
    """Nystroem attention on sampled landmarks, linear in the number of tokens, untrained.

    out = softmax(s Q Kp') Z(A) softmax(s Qp K') V with A = softmax(s Qp Kp').

    Args:
        num_landmarks: landmarks m of each picture, guaranteed ones included; one number, or one a
            block.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled; see `LandmarkAttention`.
        renew: take landmarks anew at `every` layer, every so many, or `never`.
        guarantee: token classes that are landmarks; see `LandmarkAttention`.
        exclude: token classes that are never landmarks.
        per_head: every head samples its own landmarks, from its own q or k.
        exact_cls: give CLS its exact output, which the chain knows where CLS is a landmark.
        guard: largest residual that is believed before ridge and then exact attention are taken,
            see `Guard`; None = nobody looks.
    """

    def __init__(
        self,
        *,
        num_landmarks: Counts = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "normed",
        renew: int | str = 1,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
        exact_cls: bool = True,
        guard: float | None = None,
    ) -> None:
        super().__init__(
            landmarks=landmarks or GridFarthestPointLandmarks(),
            num_landmarks=num_landmarks,
            source=source,
            renew=renew,
            guarantee=guarantee,
            exclude=exclude,
            per_head=per_head,
        )
        self.solver = solver or RidgeSolver()
        self.exact_cls = exact_cls
        self.guard = None if guard is None else Guard(guard)

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
        """See `ops.nystrom_attention`."""
        more: dict[str, Any] = {"scale": context.scale, "solver": self.solver}
        more |= {"keys": keys, "bias": bias, "distinct": not self.may_repeat}
        more["exact_rows"] = int(self.exact_cls and "cls" in self.guarantee and context.has_cls)
        landmarks = self.choose(q, k, keys, context)
        if self.guard is None:
            return ops.nystrom_attention(q, k, v, landmarks, **more)
        return self.guard.nystrom_attention(q, k, v, landmarks, layer=context.layer, **more)

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        solver = self.solver.formula
        return ops.nystrom_flops(tokens, heads, head_dim, self.num_landmarks, solver=solver)
