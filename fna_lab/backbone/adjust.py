"""Mask strategies that change tokens, attention weights or what attention adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fna_lab import ops
from fna_lab.attn.base import Context
from fna_lab.attn.registers import PLACES
from fna_lab.backbone.passes import Pass
from fna_lab.hosts import given, out_projection, tokens_first, with_given
from fna_lab.mask.base import Mask


class Adjuster:
    """Lets a strategy have its way with tokens, weights and output of the masked blocks.

    Args:
        mask: the strategy.
        blocks: the host's blocks.
        layers: those that it acts on.

    Attributes:
        works: whether weights or output are changed.
        span: blocks in which tokens that the strategy appends are there.
    """

    def __init__(self, mask: Mask, blocks: Sequence[nn.Module], layers: Sequence[int]) -> None:
        self.mask = mask
        self.blocks = blocks
        self.projections = (
            {layer: out_projection(blocks[layer]) for layer in layers} if mask.corrects else {}
        )
        self.works = mask.reweighs or mask.corrects
        self.span = range(layers[0], len(blocks)) if mask.appends else range(0)
        self._turn = tokens_first(blocks[0])
        self._correction: Tensor | None = None

    def hooks(self, state: Callable[[], Pass | None]) -> Iterator[RemovableHandle]:
        """Hooks on the output projections, where they are modules, and for appended tokens.

        Args:
            state: the running pass, None while the patch is switched off.
        """
        if self.span:
            first, last = self.blocks[self.span[0]], self.blocks[-1]
            yield first.register_forward_pre_hook(
                lambda _, __, kwargs: self._check(kwargs) if state() else None, with_kwargs=True
            )
            yield last.register_forward_hook(lambda _, __, out: self._drop(out, state()))
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
        if self.span:
            more, state.appended = self.mask.appended(x, tokens)
            return torch.cat([new, more], dim=1)
        return torch.cat([new, x[:, own:]], dim=1) if extra else new

    def extra(self, layer: int, state: Pass) -> int:
        """How many tokens the strategy appended in a block."""
        return 0 if state.appended is None or layer not in self.span else state.appended.shape[1]

    def keys(self, attn_mask: Tensor | None, x: Tensor, layer: int, state: Pass) -> Tensor | None:
        """The host's mask with appended tokens behind, padding among them hidden: `[b 1 1 n]`.

        Args:
            attn_mask: the host's, as it came.
            x: the block's input `[b n c]`, appended tokens included.
            layer: the block.
            state: the running pass.

        Raises:
            NotImplementedError: the host's mask or bias tells tokens apart by their place.
        """
        if state.appended is None or layer not in self.span:
            return attn_mask
        state.ran += 1
        own = ops.kept_tokens(attn_mask)
        if attn_mask is not None and own is None:
            raise NotImplementedError(
                f"mask={self.mask.name} with a concatenation cannot honour the host's attention "
                f"mask or position bias of shape {tuple(attn_mask.shape)}: appended tokens have "
                "no place in it; expected a padding mask [b 1 1 n]."
            )
        if own is None:
            before = x.shape[1] - state.appended.shape[1]
            return F.pad(state.appended, (before, 0), value=True)[:, None, None]
        own = own.expand(len(state.appended), -1)
        return torch.cat([own, state.appended], dim=1)[:, None, None]

    def _check(self, kwargs: dict[str, Any]) -> None:
        for name, what in PLACES.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"mask={self.mask.name} with a concatenation cannot honour the {what} of this "
                    f"host ({name}): appended tokens have no place in it; expected a host whose "
                    "position encoding is added to its tokens."
                )

    def _drop(self, out: Any, state: Pass | None) -> Any:
        if state is None or state.appended is None:
            return None
        if state.ran != len(self.span):
            raise RuntimeError(
                f"mask={self.mask.name} appended tokens that {len(self.span) - state.ran} of the "
                "blocks behind know nothing of; another patch has taken these blocks."
            )
        x = given(out, turn=self._turn)
        return with_given(out, x[:, : x.shape[1] - state.appended.shape[1]], turn=self._turn)

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
