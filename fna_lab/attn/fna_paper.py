"""Fast Nystroem Attention with the published choices."""

from __future__ import annotations

from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.fps import FarthestPointLandmarks
from fna_lab.attn.solver.base import Solver
from fna_lab.attn.solver.newton_schulz import NewtonSchulzSolver


class PublishedFastNystromAttention(FastNystromAttention):
    """CLS and farthest points of the first layer's input, reused; six cubic iterations.

    Args:
        num_landmarks: landmarks m of each picture, CLS included.
        landmarks: the sampler; None = farthest points.
        solver: what stands for the inverse of A; None = the cubic iteration.
        source: what is sampled.
        renew: take landmarks anew every so many layers, 0 = never.
        keep_cls: make CLS the first landmark.
    """

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "input",
        renew: int = 0,
        keep_cls: bool = True,
    ) -> None:
        super().__init__(
            num_landmarks=num_landmarks,
            landmarks=landmarks or FarthestPointLandmarks(),
            solver=solver or NewtonSchulzSolver(),
            source=source,
            renew=renew,
            keep_cls=keep_cls,
            sketch=None,
            exact_cls=False,
            clusters=False,
        )
