"""Performer: softmax attention by positive orthogonal random features."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, KeyMaskedAttention
from fna_lab.settings import check_integer


class PerformerAttention(KeyMaskedAttention):
    """Linear attention with random features that estimate exp(s q k') without bias.

    Args:
        num_features: random directions.
        seed: seed of the draw, the same for every layer.

    Raises:
        ValueError: `num_features` is no positive integer.
    """

    joins = True

    def __init__(self, *, num_features: int = 256, seed: int = 0) -> None:
        check_integer("attn.num_features", num_features)
        check_integer("attn.seed", seed, least=None)
        self.num_features = num_features
        self.seed = seed

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
        """Attend by random features.

        Raises:
            NotImplementedError: the host adds a bias to its logits.
        """
        if bias is not None:
            raise NotImplementedError(
                f"attn={self.name} cannot honour the position bias that this host adds to its "
                "logits."
            )
        features = ops.orthogonal_features(self.num_features, q.shape[-1], seed=self.seed)
        return ops.performer_attention(q, k, v, features, scale=context.scale, keys=keys)

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers."""
        del channels
        return layers * 8 * heads * tokens * self.num_features * head_dim
