"""Fast Nystroem Attention with the parts that measure best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, Removal
from fna_lab.attn.guard import Guard
from fna_lab.attn.landmarks.base import HEAD_SOURCES, LandmarkSampler, source_points
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.layers import Counts
from fna_lab.attn.reduced import LandmarkAttention, slot_of
from fna_lab.attn.solver.base import Solver, check_solver
from fna_lab.attn.solver.ridge import RidgeSolver
from fna_lab.settings import check_flag, check_integer, check_number

# Fewest landmarks that are fitted by default, where there are as many.
LEAST_ROWS = 32


class FastNystromAttention(LandmarkAttention):
    """Nystroem attention on sampled landmarks, linear in the number of tokens, untrained.

    Every token joins its nearest landmark; `ops.clustered_attention` attends to the mean keys of
    these clusters. Without clusters it is the plain chain,
    out = softmax(s Q Kp') Z(A) softmax(s Qp K') V with A = softmax(s Qp Kp').

    Args:
        num_landmarks: landmarks m of each picture, guaranteed ones included; one number, or one a
            block.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled and clustered; see `LandmarkAttention`.
        sketch: project that to so many random dimensions first; None = no projection.
        renew: where landmarks and their clusters are taken anew; see `LandmarkAttention`.
        guarantee: token classes that are landmarks; see `LandmarkAttention`.
        exclude: token classes that are never landmarks.
        per_head: every head samples its own landmarks, from its own q or k.
        exact_cls: give CLS its exact output, which the chain knows where CLS is a landmark.
        guard: largest residual that is believed before ridge and then exact attention are taken,
            see `Guard`; None = nobody looks.
        clusters: let landmarks stand for clusters of tokens.
        rows: tokens whose exact outputs the values are fitted to, for each landmark: 0.5 = every
            second landmark, 1 = the landmarks, 3 = two more tokens for each. More of them fit
            better, and cost a thin attention each. None = 0.5, but at least 32 landmarks; and 1
            where no other is possible.

    Raises:
        ValueError: a setting is out of range, or `rows` needs another solver.
    """

    def __init__(
        self,
        *,
        num_landmarks: Counts = 64,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "k",
        sketch: int | None = 64,
        renew: int | str = "settled",
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
        exact_cls: bool = True,
        guard: float | None = None,
        clusters: bool = True,
        rows: float | None = None,
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
        check_integer("attn.sketch", sketch, optional=True)
        for name, flag in (("exact_cls", exact_cls), ("clusters", clusters)):
            check_flag(f"attn.{name}", flag)
        check_solver(solver)
        self.solver = solver or RidgeSolver()
        self.rows = _read_rows(rows, clusters=clusters, square=self.solver.square)
        self.sketch = sketch
        self.exact_cls = exact_cls
        self.guard = None if guard is None else Guard(guard)
        self.clusters = clusters

    def width(self, channels: int) -> int:
        """Channels of what is sampled, for so many of the host (or of its heads)."""
        width = super().width(channels)
        return min(width, self.sketch or width)

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
        more: dict[str, Any] = {"scale": context.scale, "solver": self._solver()}
        more |= {"keys": keys, "bias": bias, "distinct": self._distinct(keys, context)}
        more["exact_rows"] = self._exact_rows(context)
        landmarks, points = self.served(keys, context), None
        if landmarks is None:
            with context.timed("selection"):
                points = self._points(q, k, context)
            sampled = None if self.landmarks.reads == "attention" else points
            landmarks = self.renewed(q, k, keys, context, sampled)
        attention = ops.nystrom_attention
        if self.clusters:
            attention = ops.clustered_attention
            more |= self._clusters(points, landmarks, keys, context, distinct=more["distinct"])
            more["rows"] = self._fitted(landmarks, keys, q.shape[2])
            removal = context.removal
            if removal is not None and self.removes(removal, v, bias):
                more["removed"] = removal.rows, removal.valid
                more["own"], more["sunk"] = removal.pattern == "type2", removal.stage == "sink"
        if self.guard is None:
            return attention(q, k, v, landmarks, **more)
        layer = context.layer if context.stays else None
        return self.guard.attention(attention, q, k, v, landmarks, layer=layer, **more)

    def removes(self, removal: Removal, v: Tensor, bias: Tensor | None) -> bool:
        """Whether clusters see to a removal themselves."""
        # What is left of a `sink` is a difference, which half precision would lose.
        told = removal.stage == "mask" or v.dtype in (torch.float32, torch.float64)
        return told and self.clusters and self.guard is None and bias is None

    def points(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:
        """What is sampled, `[b n c]` or per head `[b*h n c]`; None = the sampler asks for it."""
        return None if self.landmarks.reads == "attention" else self._points(q, k, context)

    def _points(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """What is sampled and clustered, in a sketch: `[b n c]`, or per head `[b*h n c]`."""
        if self.source == "normed" and self.sketch and self.sketch < context.x.shape[2]:
            return ops.sketch_points(context.x, self.sketch, normed=True)  # takes no normed copy
        points = source_points(self.source, q, k, context, per_head=self.per_head)
        if self.sketch is None or self.sketch >= points.shape[2]:
            return points
        return ops.sketch_points(points, self.sketch, groups=self._groups(points.shape[2]))

    def _groups(self, channels: int) -> int:
        """In how many groups of so many channels they are projected."""
        # Keys and queries differ in all heads: two projections of half of them are as good.
        return math.gcd(2, channels, self.sketch or 1) if self.source in HEAD_SOURCES else 1

    def _clusters(
        self,
        points: Tensor | None,
        landmarks: Tensor,
        keys: Tensor | None,
        context: Context,
        *,
        distinct: bool,
    ) -> dict[str, Any]:
        """Clusters of landmarks for `ops.clustered_attention`: new ones if there are points."""
        shared, slot = context.shared, slot_of(keys, context)
        members, runs = f"{slot}: members", f"{slot}: runs"
        if points is not None:
            with context.timed("selection"):
                shared[members] = self._members(points, landmarks, keys, distinct=distinct)
            shared[runs] = ops.cluster_runs(shared[members], landmarks.shape[1])
        found: dict[str, Any] = {"members": shared[members]}
        return found if self.guard else found | {"runs": shared[runs]}  # a guard takes some heads

    def _exact_rows(self, context: Context) -> int:
        """How many of the first landmarks get their exact outputs."""
        return int(self.exact_cls and "cls" in self.guarantee and context.has_cls)

    def _solver(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(A `[b h r m]`, B `[b h r d]`) -> Z(A) B."""
        return self.solver

    def _members(
        self,
        points: Tensor,
        landmarks: Tensor,
        keys: Tensor | None,
        *,
        distinct: bool,
    ) -> Tensor:
        """The landmark of each token, long `[b n]`, or per head `[b h n]`."""
        if self.per_head and keys is not None:
            keys = keys.repeat_interleave(landmarks.shape[1], dim=0)
        marks = landmarks.flatten(0, 1) if self.per_head else landmarks
        members = self._cluster(points, marks, keys, distinct=distinct)
        return members.unflatten(0, landmarks.shape[:2]) if self.per_head else members

    def _cluster(
        self, points: Tensor, landmarks: Tensor, keys: Tensor | None, *, distinct: bool
    ) -> Tensor:
        """The landmark of each token, long `[b n]`, for landmarks `[b m]` and keys `[b n]`."""
        return ops.nearest_landmarks(points, landmarks, allowed=keys, distinct=distinct)

    def _fitted(self, landmarks: Tensor, keys: Tensor | None, tokens: int) -> Tensor | None:
        """Tokens whose exact outputs are fitted, long `[b r]` or `[b h r]`; None = landmarks."""
        marks = landmarks.shape[-1]
        count = self._rows_of(marks)
        if count == marks:
            return None
        if count < marks:
            if marks % count == 0:
                return landmarks[..., :: marks // count]
            return landmarks[..., [i * marks // count for i in range(count)]]
        count = min(count - marks, tokens)
        if keys is None:
            keys = torch.ones((len(landmarks), tokens), dtype=torch.bool, device=landmarks.device)
        more = ops.segment_centres(keys, count)  # at equal distances
        if landmarks.ndim == 3:
            more = more[:, None].expand(-1, landmarks.shape[1], -1)
        return torch.cat([landmarks, more], dim=-1)

    def _rows_of(self, marks: int) -> int:
        """How many exact outputs are fitted with so many landmarks."""
        if self.rows is None:  # fewer are hardly cheaper, and lose much
            return max(marks // 2, min(marks, LEAST_ROWS))
        return max(1, round(self.rows * marks))

    def _distinct(self, keys: Tensor | None, context: Context) -> bool:
        """Whether no landmark can repeat among keys bool `[b n]`, as far as the host knows."""
        barred = self.barred(keys, context)
        if barred is None or keys is None:
            return barred is not None
        return keys.shape[1] - barred >= self.landmarks_at(context.layer, context.nth)

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        marks = self.num_landmarks
        if not self.clusters:
            solve = self.solver.flops(marks, marks, head_dim)
            return ops.nystrom_flops(tokens, heads, head_dim, marks, solve=solve)
        rows = self._rows_of(marks)
        solve = self.solver.flops(rows, marks, head_dim)
        return ops.clustered_flops(tokens, heads, head_dim, marks, rows=rows, solve=solve)

    def selection_flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of new landmarks and their clusters, for one picture or one head of it."""
        flops, dims, wide = super().selection_flops(tokens, channels, num), 0, 0
        if self.clusters or self.landmarks.reads == "source":
            dims, wide = self.width(channels), super().width(channels)
        if dims < wide:
            flops += ops.sketch_flops(tokens, wide, dims, self._groups(wide))
        return flops + (2 * tokens * num * dims if self.clusters else 0)


def _read_rows(rows: float | None, *, clusters: bool, square: bool) -> float | None:
    """The setting `attn.rows`; 1 where nothing else is possible."""
    if rows is None:
        return None if clusters and not square else 1
    check_number("attn.rows", rows, "a number > 0, or null", above=0)
    if rows != 1 and not clusters:
        raise ValueError(f"attn.rows={rows}: expected 1 or null with attn.clusters=false.")
    if rows != 1 and square:
        raise ValueError(
            f"attn.rows={rows}: expected 1 or null with a solver that inverts square matrices "
            "alone; use attn/solver=ridge."
        )
    return rows
