"""Chosen tokens exact, the rest by Nystroem attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.landmarks.grid_fps import GridFarthestPointLandmarks
from fna_lab.attn.reduced import LandmarkAttention
from fna_lab.attn.solver.base import Solver, check_solver
from fna_lab.attn.solver.ridge import RidgeSolver


class ExplicitAttention(LandmarkAttention):
    """A few explicit tokens are attended to, and attend, exactly; landmarks stand for the others.

    Of the landmarks, the first `num_explicit` are explicit: guaranteed classes, then what the
    sampler takes. With all tokens explicit, attention is exact.

    Args:
        num_landmarks: tokens picked in each picture, explicit ones included.
        num_explicit: how many of them are explicit: fewer than all, or all the tokens there are.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled; see `LandmarkAttention`.
        renew: where landmarks are taken anew; see `LandmarkAttention`.
        guarantee: token classes that are explicit, as far as there is room.
        exclude: token classes that are neither explicit nor landmarks.
        per_head: every head samples its own landmarks, from its own q or k.

    Raises:
        ValueError: a setting is out of range.
    """

    counts_at_will = False  # explicit tokens are among them

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        num_explicit: int = 16,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "normed",
        renew: int | str = 1,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
    ) -> None:
        if not isinstance(num_landmarks, int):
            raise ValueError(
                f"attn.num_landmarks={num_landmarks!r}: expected one number for all blocks."
            )
        super().__init__(
            landmarks=landmarks or GridFarthestPointLandmarks(),
            num_landmarks=num_landmarks,
            source=source,
            renew=renew,
            guarantee=guarantee,
            exclude=exclude,
            per_head=per_head,
        )
        good = isinstance(num_explicit, int) and not isinstance(num_explicit, bool)
        if not good or not 1 <= num_explicit <= num_landmarks:
            raise ValueError(
                f"attn.num_explicit={num_explicit!r}: expected an integer from 1 to "
                f"attn.num_landmarks={num_landmarks}."
            )
        self.num_explicit = num_explicit
        check_solver(solver)
        self.solver = solver or RidgeSolver()

    def check_tokens(self, tokens: int) -> None:
        """Refuse more landmarks than tokens, and implicit tokens that nobody stands for."""
        super().check_tokens(tokens)
        if self.num_explicit == self.num_landmarks < tokens:
            raise ValueError(
                f"attn.num_explicit={self.num_explicit}: leaves no landmark of the "
                f"{self.num_landmarks} for the other {tokens - self.num_explicit} tokens; "
                f"expected less than attn.num_landmarks={self.num_landmarks}."
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
        """See `ops.explicit_attention`."""
        return ops.explicit_attention(
            q,
            k,
            v,
            self.choose(q, k, keys, context),
            self.num_explicit,
            self.solver,
            scale=context.scale,
            keys=keys,
            bias=bias,
            distinct=not self.may_repeat,
        )

    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""
        marks = self.num_landmarks - self.num_explicit
        both = 2 * ops.subset_flops(tokens, heads, head_dim, self.num_landmarks)
        if not marks:
            return both
        thin = 2 * ops.subset_flops(tokens, heads, head_dim, marks)
        solve = self.solver.flops(marks, marks, head_dim)
        return both + ops.nystrom_flops(tokens, heads, head_dim, marks, solve=solve) - thin
