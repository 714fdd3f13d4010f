"""Random landmarks, the same places in every picture of a run."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.landmarks.base import LandmarkSampler, highest
from fna_lab.settings import check_integer


class RandomLandmarks(LandmarkSampler):
    """Tokens drawn uniformly without replacement.

    The draw depends on the seed and the number of tokens alone, never on the batch.

    Args:
        seed: seed of the draw.
    """

    def __init__(self, *, seed: int = 0) -> None:
        check_integer("attn.landmarks.seed", seed, least=None)
        self.seed = seed

    def __call__(
        self,
        points: Tensor,
        num: int,
        *,
        guaranteed: Tensor,
        allowed: Tensor | None,
        num_prefix_tokens: int,  # noqa: ARG002 (any token may be taken)
        grid: tuple[int, int] | None,  # noqa: ARG002
    ) -> Tensor:
        """Guaranteed tokens, then random ones: `[b n c]` -> long `[b m]`."""
        batch, num_tokens, _ = points.shape
        order = ops.uniform_numbers(num_tokens, self.seed).to(points.device).expand(batch, -1)
        if allowed is not None:
            order = order.masked_fill(~allowed, -1)
        return highest(order, num, guaranteed)
