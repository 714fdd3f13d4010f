"""Chosen tokens exact, clusters stand for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.fna import FastNystromAttention
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.attn.solver.base import Solver
from fna_lab.settings import is_whole


class ExplicitAttention(FastNystromAttention):
    """A few explicit tokens are attended to, and attend, exactly; clusters stand for the others.

    Of the landmarks, the first `num_explicit` are explicit: guaranteed classes, then what the
    sampler takes. They are clusters of themselves alone, with their own values, so that one
    softmax weighs them against the others by log-sum-exp; the values of the other clusters are
    fitted to the exact rows of all landmarks, as `fna` does. With all tokens explicit, attention
    is exact. Explicit tokens that a mask of the stage `sink` takes away see themselves as those of
    `fna` do.

    Args:
        num_landmarks: tokens picked in each picture, explicit ones included.
        num_explicit: how many of them are explicit: fewer than all, or all the tokens there are.
        landmarks: the sampler; None = half a grid, half farthest points.
        solver: what stands for the inverse of A; None = ridge.
        source: what is sampled and clustered; see `LandmarkAttention`.
        sketch: project that to so many random dimensions first; None = no projection.
        renew: where landmarks are taken anew; see `LandmarkAttention`.
        guarantee: token classes that are explicit, as far as there is room.
        exclude: token classes that are neither explicit nor landmarks.
        per_head: every head samples its own landmarks, from its own q or k.

    Raises:
        ValueError: a setting is out of range.

    Source: the explicit / implicit split of Fast Nystroem Attention's companion study, whose
    implicit part is the plain Nystroem chain.
    """

    counts_at_will = False  # explicit tokens are among them

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        num_explicit: int = 16,
        landmarks: LandmarkSampler | None = None,
        solver: Solver | None = None,
        source: str = "k",
        sketch: int | None = 64,
        renew: int | str = "settled",
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
    ) -> None:
        if not is_whole(num_landmarks):
            raise ValueError(
                f"attn.num_landmarks={num_landmarks!r}: expected one number for all blocks."
            )
        super().__init__(
            num_landmarks=num_landmarks,
            landmarks=landmarks,
            solver=solver,
            source=source,
            sketch=sketch,
            renew=renew,
            guarantee=guarantee,
            exclude=exclude,
            per_head=per_head,
            rows=1,  # the rows of all landmarks are there
        )
        if not is_whole(num_explicit) or not 1 <= num_explicit <= num_landmarks:
            raise ValueError(
                f"attn.num_explicit={num_explicit!r}: expected an integer from 1 to "
                f"attn.num_landmarks={num_landmarks}."
            )
        self.num_explicit = num_explicit

    def check_tokens(self, tokens: int) -> None:
        """Refuse more landmarks than tokens, and implicit tokens that nobody stands for."""
        super().check_tokens(tokens)
        if self.num_explicit == self.num_landmarks and self.exclude:
            raise ValueError(
                f"attn.exclude={list(self.exclude)}: leaves no landmark for excluded tokens with "
                f"attn.num_explicit={self.num_explicit} of {self.num_landmarks}; expected fewer."
            )
        if self.num_explicit == self.num_landmarks < tokens:
            raise ValueError(
                f"attn.num_explicit={self.num_explicit}: leaves no landmark of the "
                f"{self.num_landmarks} for the other {tokens - self.num_explicit} tokens; "
                f"expected less than attn.num_landmarks={self.num_landmarks}."
            )

    def _exact_rows(self, context: Context) -> int:  # noqa: ARG002
        return self.num_explicit

    def _solver(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self._solve

    def _solve(self, kernel: Tensor, values: Tensor) -> Tensor:
        """Corrections `[b h m d]` of the landmarks' values: none of the explicit ones."""
        first = self.num_explicit
        known = first if self.solver.square else 0
        own = values.new_zeros(*values.shape[:2], first, values.shape[3])
        if first == kernel.shape[3]:
            return own
        rest = self.solver(kernel[:, :, known:, first:], values[:, :, known:])
        return torch.cat([own, rest], dim=2)

    def _cluster(
        self, points: Tensor, landmarks: Tensor, keys: Tensor | None, *, distinct: bool
    ) -> Tensor:
        """The landmark of each token: explicit ones have nobody but themselves."""
        first, rest = landmarks[:, : self.num_explicit], landmarks[:, self.num_explicit :]
        members = landmarks.new_full(points.shape[:2], -1)
        if rest.shape[1]:
            # Where few tokens may be taken the rest may repeat explicit ones: empty clusters.
            allowed = torch.ones_like(members, dtype=torch.bool) if keys is None else keys.clone()
            allowed.scatter_(1, first, False)
            members = ops.nearest_landmarks(points, rest, allowed=allowed, distinct=distinct)
            members = torch.where(members < 0, members, members + self.num_explicit)
        place = torch.arange(first.shape[1], device=first.device).expand_as(first)
        return members.scatter_reduce(1, first, place, "amin", include_self=False)
