"""Landmark keys and values only: what is left of Nystroem attention without its kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.layers import Counts
from fna_lab.attn.reduced import LandmarkAttention


class SubsetAttention(LandmarkAttention):
    """Every query attends to the landmarks and to nothing else: softmax(s Q Kp') Vp.

    Args:
        num_landmarks: landmarks m of each picture, guaranteed ones included; one number, or one a
            block.
        landmarks: the sampler; None = half a grid, half farthest points.
        source: what is sampled; see `LandmarkAttention`.
        renew: where landmarks are taken anew; see `LandmarkAttention`.
        guarantee: token classes that are landmarks; see `LandmarkAttention`.
        exclude: token classes that are never landmarks.
        per_head: every head samples its own landmarks, from its own q or k.
    """

    def __init__(
        self,
        *,
        num_landmarks: Counts = 64,
        landmarks: LandmarkSampler | None = None,
        source: str = "normed",
        renew: int | str = 1,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
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
        """Exact attention over the landmark keys and values, which are kept keys all."""
        picks = self.choose(q, k, keys, context)
        distinct = keys is None and not self.may_repeat
        return ops.subset_attention(
            q, k, v, picks, scale=context.scale, bias=bias, distinct=distinct
        )

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        return ops.subset_flops(tokens, heads, head_dim, self.num_landmarks)
