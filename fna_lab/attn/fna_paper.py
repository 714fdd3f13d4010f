"""Fast Nystroem Attention with the published choices."""

from __future__ import annotations

from collections.abc import Sequence

from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.layers import Counts
from fna_lab.attn.solver.base import Solver
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver


class PublishedFastNystromAttention(FastNystromAttention):
    """CLS and farthest points of the first layer's input, reused; six cubic iterations.

    Args:
        num_landmarks: landmarks m of each picture, guaranteed ones included; one number, or one a
            block.
        landmarks: the sampler; None = farthest points.
        solver: what stands for the inverse of A; None = the cubic iteration.
        source: what is sampled.
        renew: where landmarks are taken anew; see `LandmarkAttention`.
        guarantee: token classes that are landmarks; see `LandmarkAttention`.
        exclude: token classes that are never landmarks.
        guard: largest residual that is believed, see `Guard`; None = nobody looks.
        per_head: every head samples its own landmarks, from its own q or k.
    """

    def __init__(
        self,
        *,
        num_landmarks: Counts = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "input",
        renew: int | str = 0,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        guard: float | None = None,
        per_head: bool = False,
    ) -> None:
        super().__init__(
            num_landmarks=num_landmarks,
            landmarks=landmarks or FarthestPointLandmarks(),
            solver=solver or NewtonSchulzSolver(),
            source=source,
            renew=renew,
            guarantee=guarantee,
            exclude=exclude,
            per_head=per_head,
            sketch=None,
            exact_cls=False,
            clusters=False,
            guard=guard,
        )
