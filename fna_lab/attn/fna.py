"""Fast Nystroem Attention with the parts that measure best."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, LandmarkAttention
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.solver.base import Solver
from fna_lab.attn.solver.ridge import RidgeSolver


class FastNystromAttention(LandmarkAttention):
    """Nystroem attention on sampled landmarks, linear in the number of tokens, untrained.

    Every token joins its nearest landmark; `ops.clustered_attention` attends to the mean keys of
    these clusters. Without clusters it is the plain chain,
    out = softmax(s Q Kp') Z(A) softmax(s Qp K') V with A = softmax(s Qp Kp').

    Args:
        num_landmarks: landmarks m of each picture, CLS included.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled and clustered; see `LandmarkAttention`.
        sketch: project that to so many random dimensions first; None = no projection.
        renew: take landmarks anew every so many layers, 0 = never.
        keep_cls: make CLS the first landmark.
        exact_cls: give CLS its exact output, which the chain knows where CLS is a landmark.
        clusters: let landmarks stand for clusters of tokens.
        rows: tokens whose exact outputs the values are fitted to, for each landmark; 1 = the
            landmarks themselves. More of them fit better, and cost a thin attention each.

    Raises:
        ValueError: a setting is out of range, or `rows` needs another solver.
    """

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "k",
        sketch: int | None = 64,
        renew: int = 1,
        keep_cls: bool = True,
        exact_cls: bool = True,
        clusters: bool = True,
        rows: int = 1,
    ) -> None:
        super().__init__(
            landmarks=landmarks or GridFarthestPointLandmarks(),
            num_landmarks=num_landmarks,
            source=source,
            renew=renew,
            keep_cls=keep_cls,
        )
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"attn.rows={rows!r}: expected an integer >= 1.")
        if sketch is not None and (not isinstance(sketch, int) or sketch < 1):
            raise ValueError(f"attn.sketch={sketch!r}: expected an integer >= 1, or null.")
        if rows > 1 and not clusters:
            raise ValueError(f"attn.rows={rows}: expected 1 with attn.clusters=false.")
        self.solver = solver or RidgeSolver()
        if rows > 1 and self.solver.square:
            raise ValueError(
                f"attn.rows={rows}: expected 1 with a solver that inverts square matrices alone; "
                "use attn/solver=ridge."
            )
        self.sketch = sketch
        self.exact_cls = exact_cls
        self.clusters = clusters
        self.rows = rows

    def width(self, channels: int) -> int:
        """Channels of the `features`, for so many of the host."""
        width = super().width(channels)
        return min(width, self.sketch or width)

    def features(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """What is sampled and clustered, in a sketch: `[b n c]`."""
        points = super().features(q, k, context)
        if self.sketch is None or self.sketch >= points.shape[2]:
            return points
        return ops.sketch_points(points, self.sketch)

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
        """See `ops.clustered_attention` and `ops.nystrom_attention`."""
        exact_rows = int(self.exact_cls and self.keep_cls and context.has_cls)
        if not self.clusters:
            return ops.nystrom_attention(
                q,
                k,
                v,
                self.choose(q, k, keys, context),
                scale=context.scale,
                solver=self.solver,
                keys=keys,
                bias=bias,
                exact_rows=exact_rows,
            )
        points = self.features(q, k, context)
        landmarks = self.choose(q, k, keys, context, points)
        begin = context.stopwatch.now() if context.stopwatch else 0.0
        members = ops.nearest_landmarks(points, landmarks, allowed=keys)
        if context.stopwatch:
            context.stopwatch.note("selection", begin)
        return ops.clustered_attention(
            q,
            k,
            v,
            landmarks,
            members,
            self.solver,
            scale=context.scale,
            more_rows=self._more_rows(landmarks, keys, q.shape[2]),
            keys=keys,
            bias=bias,
            exact_rows=exact_rows,
        )

    def _more_rows(self, landmarks: Tensor, keys: Tensor | None, tokens: int) -> Tensor | None:
        """Tokens at equal distances, long `[b t]`."""
        if self.rows == 1:
            return None
        count = min((self.rows - 1) * self.num_landmarks, tokens)
        if keys is None:
            keys = torch.ones((len(landmarks), tokens), dtype=torch.bool, device=landmarks.device)
        return ops.segment_centres(keys, count)

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        solver = self.solver.formula
        if not self.clusters:
            return ops.nystrom_flops(tokens, heads, head_dim, self.num_landmarks, solver=solver)
        return ops.clustered_flops(
            tokens, heads, head_dim, self.num_landmarks, rows=self.rows, sketch=self.sketch
        )
