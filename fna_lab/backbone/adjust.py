"""Mask strategies that change attention weights, or what attention adds, instead of masking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.backbone.parts import out_projection
from fna_lab.backbone.search import Pass
from fna_lab.mask.base import Mask


class Adjuster:
    """Lets a strategy have its way with weights and output of the masked blocks.

    Args:
        mask: the strategy.
        blocks: the host's blocks.
        layers: those that it acts on.

    Attributes:
        works: whether the strategy does any of this.
    """

    def __init__(self, mask: Mask, blocks: Sequence[nn.Module], layers: Sequence[int]) -> None:
        self.mask = mask
        self.blocks = blocks
        self.projections = (
            {layer: out_projection(blocks[layer]) for layer in layers} if mask.corrects else {}
        )
        self.works = mask.reweighs or mask.corrects
        self._correction: Tensor | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hooks on the output projections, where they are modules that are called."""
        for layer, projection in self.projections.items():
            yield projection.register_forward_hook(self._behind)
            # A block that raises must leave nothing for the next pass, which may be unpatched.
            yield self.blocks[layer].register_forward_hook(self._forget, always_call=True)

    def rewrite(self, x: Tensor, tokens: Tensor, state: Pass, prefix: int, extra: int) -> Tensor:
        """The first masked block's input `[b n c]` as the strategy changes it, given T.

        Tokens that are appended behind the host's own, `extra` of them, stay as they are.
        """
        own = x.shape[1] - extra
        kept = None if state.kept is None else state.kept[:, :own]
        where = {"num_prefix_tokens": prefix, "grid": state.grid, "kept": kept}
        new = self.mask.rewrite(x[:, :own], tokens[:, :own], **where)
        return torch.cat([new, x[:, own:]], dim=1) if extra else new

    def before(
        self, context: Context, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None
    ) -> None:
        """Prepare what changes the weights, or is added to the output, given T bool `[b n]`.

        Without T, where the strategy needs none, nothing is in it.
        """
        if tokens is None:
            tokens = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        if self.mask.reweighs:
            prefix = context.num_prefix_tokens
            context.reweigh = partial(self.mask.reweigh, tokens=tokens, num_prefix_tokens=prefix)
        if self.mask.corrects:
            weights = ops.attention_pattern(q, k, scale=context.scale, bias=context.attn_mask)
            out_weight = self.projections[context.layer].weight
            more = self.mask.correct(weights, context.x, v, out_weight, tokens)
            self._correction = more.to(v.dtype)

    def _behind(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:  # noqa: ARG002
        return self.after(out)

    def _forget(self, *args: Any) -> None:  # noqa: ARG002
        self._correction = None

    def after(self, out: Tensor) -> Tensor:
        """The projected output of attention, `[b n c]`, with what is added."""
        more, self._correction = self._correction, None
        return out if more is None else out + more
