"""What every landmark sampler promises."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops

if TYPE_CHECKING:
    from fna_lab.attn.base import Context

HEAD_SOURCES = ("q", "k", "qk")
SOURCES = ("input", "normed", *HEAD_SOURCES)


class LandmarkSampler(ABC):
    """Chooses the tokens that stand for all; stateless, and blind to the other pictures.

    Attributes:
        reads: `source` = the features that the variant names; `attention` = what `drawn` tells,
            given as one channel.
        barred: a promise that at most so many tokens of a picture are not allowed; None = no
            promise.
    """

    reads: str = "source"
    barred: int | None = None

    @abstractmethod
    def __call__(
        self,
        points: Tensor,
        num: int,
        *,
        guaranteed: Tensor,
        allowed: Tensor | None,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        """Choose landmarks.

        Args:
            points: features of the tokens `[b n c]`.
            num: how many landmarks m, the guaranteed ones included.
            guaranteed: token indices that come first, long `[b g]`, g may be 0.
            allowed: bool `[b n]`, False where a token must not be taken; None = all may.
            num_prefix_tokens: tokens before the patch tokens.
            grid: (rows, columns) of the patch tokens, None where unknown.

        Returns:
            Token indices, long `[b m]`.
        """

    def promised(self, barred: int | None) -> LandmarkSampler:
        """The same sampler, with a promise of how many tokens are `barred` at most."""
        twin = copy.copy(self)
        twin.barred = barred
        return twin

    def normed(self, x: Tensor) -> Tensor:
        """What `points` is where `source=normed`: layer-normed tokens `[b n c]` -> `[b n c]`.

        A sampler that sees a projection alone may return that, and saves the copy.
        """
        return F.layer_norm(x, x.shape[-1:])

    def drawn(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        allowed: Tensor | None,
        has_cls: bool,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        """How much attention each token draws, for a sampler that reads attention.

        Args:
            q: queries `[b h n d]`.
            k: keys `[b h n d]`.
            scale: factor of the logits.
            allowed: bool `[b n]`, False where a token must not be taken; None = all may.
            has_cls: whether token 0 is CLS.
            num_prefix_tokens: tokens before the patch tokens.
            grid: (rows, columns) of the patch tokens, None where unknown.

        Returns:
            `[b h n]`.

        Raises:
            NotImplementedError: the sampler does not read attention.
        """
        del q, k, scale, allowed, has_cls, num_prefix_tokens, grid
        raise NotImplementedError(f"{type(self).__name__} reads {self.reads}, not attention.")

    def with_cells(
        self,
        guaranteed: Tensor,
        num: int,
        *,
        num_prefix_tokens: int,
        grid: tuple[int, int] | None,
        instead: str,
    ) -> Tensor:
        """Guaranteed tokens, then at most `num` cells of a regular grid: long `[b g + cells]`.

        Raises:
            ValueError: the host's patch grid is unknown; `instead` names a sampler to use.
        """
        if grid is None:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(
                f"attn/landmarks={name} needs the patch grid, which this host does not show; "
                f"use attn/landmarks={instead}."
            )
        cells = [num_prefix_tokens + cell for cell in ops.grid_cells(grid, num)]
        cells = torch.tensor(cells, dtype=torch.long, device=guaranteed.device)
        return torch.cat([guaranteed, cells.expand(guaranteed.shape[0], -1)], dim=1)

    def flops(self, tokens: int, channels: int, num: int) -> int:  # noqa: ARG002
        """FLOPs of choosing `num` of `tokens` points with so many channels, for one picture."""
        return 0


def sampled_points(
    sampler: LandmarkSampler,
    source: str,
    q: Tensor,
    k: Tensor,
    context: Context,
    *,
    allowed: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """What a sampler samples: the `source`, or the attention that it reads.

    Args:
        sampler: tells what it reads.
        source: one of `SOURCES`.
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        context: of the block.
        allowed: bool `[b n]`, tokens that may be taken; None = all.
        per_head: each head on its own, as if it were a picture.

    Returns:
        `[b n c]`, or per head `[b*h n c]`.
    """
    if sampler.reads == "attention":
        drawn = sampler.drawn(
            q,
            k,
            scale=context.scale,
            allowed=allowed,
            has_cls=context.has_cls,
            num_prefix_tokens=context.num_prefix_tokens,
            grid=context.grid,
        )
        return (drawn.flatten(0, 1) if per_head else drawn.mean(1))[..., None]
    if source == "normed":
        return sampler.normed(context.x)
    return source_points(source, q, k, context, per_head=per_head)


def source_points(
    source: str, q: Tensor, k: Tensor, context: Context, *, per_head: bool = False
) -> Tensor:
    """The `source` alone, for tokens of `[b h n d]`: `[b n c]`, or per head `[b*h n c]`."""
    if source == "input":
        return context.x
    if source == "normed":
        return F.layer_norm(context.x, context.x.shape[-1:])
    if per_head:
        both = {"q": q, "k": k}.get(source)
        return (torch.cat([q, k], dim=-1) if both is None else both).flatten(0, 1)
    if source == "qk":
        return torch.cat([q, k], dim=1).transpose(1, 2).flatten(2)
    return (q if source == "q" else k).transpose(1, 2).flatten(2)


def highest(scores: Tensor, num: int, guaranteed: Tensor) -> Tensor:
    """Guaranteed tokens in their order, long `[b g]`, then those of highest scores `[b n]`.

    Returns:
        Long `[b num]`.
    """
    given = guaranteed[:, :num]
    rest = scores.scatter(1, given, -torch.inf).topk(num - given.shape[1], dim=1).indices
    return torch.cat([given, rest], dim=1)
