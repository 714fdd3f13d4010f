"""What every landmark sampler promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops


class LandmarkSampler(ABC):
    """Chooses the tokens that stand for all; stateless, and blind to the other pictures."""

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

    def normed(self, x: Tensor) -> Tensor:
        """What `points` is where `source=normed`: layer-normed tokens `[b n c]` -> `[b n c]`.

        A sampler that sees a projection alone may return that, and saves the copy.
        """
        return F.layer_norm(x, x.shape[-1:])

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
        cells = guaranteed.new_tensor(ops.grid_cells(grid, num)) + num_prefix_tokens
        return torch.cat([guaranteed, cells.expand(guaranteed.shape[0], -1)], dim=1)

    def flops(self, tokens: int, channels: int, num: int) -> int:  # noqa: ARG002
        """FLOPs of choosing `num` of `tokens` points with so many channels, for one picture."""
        return 0
