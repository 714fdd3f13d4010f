"""Fast Nystroem Attention with the parts that measure best."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, LandmarkAttention
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.solver.base import Solver
from fna_lab.attn.solver.ridge import RidgeSolver


class FastNystromAttention(LandmarkAttention):
    """Nystroem attention on sampled landmarks, linear in the number of tokens, untrained.

    out = softmax(s Q Kp') Z(A) softmax(s Qp K') V with A = softmax(s Qp Kp').

    Args:
        num_landmarks: landmarks m of each picture, guaranteed ones included.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled; see `LandmarkAttention`.
        renew: take landmarks anew at `every` layer, every so many, or `never`.
        guarantee: token classes that are landmarks; see `LandmarkAttention`.
        exclude: token classes that are never landmarks.
        exact_cls: give CLS its exact output, which the chain knows where CLS is a landmark.
    """

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "normed",
        renew: int | str = 1,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        exact_cls: bool = True,
    ) -> None:
        super().__init__(
            landmarks=landmarks or GridFarthestPointLandmarks(),
            num_landmarks=num_landmarks,
            source=source,
            renew=renew,
            guarantee=guarantee,
            exclude=exclude,
        )
        self.solver = solver or RidgeSolver()
        self.exact_cls = exact_cls

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
        return ops.nystrom_attention(
            q,
            k,
            v,
            self.choose(q, k, keys, context),
            scale=context.scale,
            solver=self.solver,
            keys=keys,
            bias=bias,
            distinct=self.distinct(keys, context),
            exact_rows=int(self.exact_cls and "cls" in self.guarantee and context.has_cls),
        )

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        solver = self.solver.formula
        return ops.nystrom_flops(tokens, heads, head_dim, self.num_landmarks, solver=solver)
