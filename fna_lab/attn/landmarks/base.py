"""What every landmark sampler promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


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

    def flops(self, tokens: int, channels: int, num: int) -> int:  # noqa: ARG002
        """FLOPs of choosing `num` of `tokens` points with so many channels, for one picture."""
        return 0
