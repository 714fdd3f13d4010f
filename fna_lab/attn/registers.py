"""Test-time registers: what register neurons do to patch tokens, an added token takes over."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle as Handle

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.neurons import firing_neurons
from fna_lab.hosts import given, hidden, mlp_output, tokens_first, with_given, with_hidden
from fna_lab.settings import check_integer, check_number, is_whole

log = logging.getLogger(__name__)

MODES = ("zero", "mean", "same")
# A block's arguments by which hosts tell each token its place, and what these are called.
PLACES = {
    "rope": "rotary embedding",
    "position_embeddings": "rotary embedding",
    "shared_rel_pos_bias": "position bias",
}


class RegistersAttention(AttentionVariant):
    """Exact attention with added register tokens, which take over the register neurons' work.

    Zero tokens without a position are appended at the first replaced block and dropped after the
    last block of the host. In the MLP of a block that `neurons` names, after the activation, each
    register takes the neuron's entry of the largest magnitude over the patch tokens, sign kept,
    picture by picture and neuron by neuron; patch tokens lose it. CLS and the host's own registers
    stay as they are.

    Args:
        neurons: `[[block, neuron], ...]`; None = found on calibration pictures, see `calibrate`.
        num_registers: added tokens.
        mode: what patch tokens get for it: `zero`, their `mean`, or the `same` as before.
        count: pictures that neurons are found on.
        top_k: neurons that are found.
        highest_layer: last block of found neurons; None = the last of the host.
        outlier_ratio: norm of an outlier token, in medians of its picture's patch tokens.

    Raises:
        ValueError: a setting is out of range.

    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers".
    """

    def __init__(
        self,
        *,
        neurons: Sequence[Sequence[int]] | None = None,
        num_registers: int = 1,
        mode: str = "zero",
        count: int = 100,
        top_k: int = 10,
        highest_layer: int | None = None,
        outlier_ratio: float = 3.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"attn.mode={mode!r}: expected one of {', '.join(MODES)}.")
        numbers = {"num_registers": num_registers, "count": count, "top_k": top_k}
        for name, value in numbers.items():
            check_integer(f"attn.{name}", value)
        check_integer("attn.highest_layer", highest_layer, least=0, optional=True)
        check_number("attn.outlier_ratio", outlier_ratio, "a number > 0", above=0)
        self.neurons = None if neurons is None else _read_neurons(neurons)
        self.num_extra_tokens = num_registers
        self.mode = mode
        self.calibration_pictures = count if neurons is None else 0
        self.top_k = top_k
        self.highest_layer = highest_layer
        self.outlier_ratio = outlier_ratio

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend exactly, added tokens among the others: `[b h n d]` x3 -> `[b h n d]`.

        Raises:
            NotImplementedError: the host's mask or bias tells tokens apart by their place.
        """
        mask = context.attn_mask
        if mask is not None and mask.shape[-1] == k.shape[2] - self.num_extra_tokens:
            kept = context.reading.kept(mask)
            if kept is not None and mask.shape[-2] != 1:  # one row says it for all that ask
                row = kept.int().argmax(1)
                mask = mask[torch.arange(len(mask), device=mask.device), :, row][:, :, None]
            if mask.shape[-2] != 1:
                raise NotImplementedError(
                    f"attn={self.name} cannot honour the host's attention mask or position bias "
                    f"of shape {tuple(mask.shape)}: added tokens have no place in it; expected a "
                    "padding mask [b 1 1 n]."
                )
            fill = True if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (0, self.num_extra_tokens), value=fill)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=context.scale)

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, added tokens included."""
        del channels
        return layers * ops.attention_flops(tokens + self.num_extra_tokens, heads, head_dim)

    def calibrate(
        self, forward: Callable[[], object], blocks: Sequence[nn.Module], layers: Sequence[int]
    ) -> AttentionVariant:
        """A copy with the neurons that fire most at the outlier tokens of these pictures.

        They are sought from the block where the registers are appended up to `highest_layer`.
        Outliers are read after the last block. Where no picture has any, the patch token of the
        largest norm of each stands in, and a warning says so. Pictures must be square: tokens that
        do not fit into the largest square grid are taken for prefix tokens.

        Raises:
            ValueError: `highest_layer` lies beyond the host, or before the registers.
        """
        highest = len(blocks) - 1 if self.highest_layer is None else self.highest_layer
        if highest >= len(blocks):
            raise ValueError(
                f"attn.highest_layer={highest}: the host has {len(blocks)} blocks, 0 to "
                f"{len(blocks) - 1}."
            )
        if highest < layers[0]:
            raise ValueError(
                f"attn.highest_layer={highest}: expected a block from {layers[0]}, where the "
                "registers are appended (the first of attn.layers)."
            )
        counted = [0, 0]

        def outliers(x: Tensor) -> Tensor:
            found = self._outliers(x)
            counted[:] = len(x), int(found.sum())
            return found

        settled = copy.copy(self)
        settled.neurons = firing_neurons(
            forward,
            blocks,
            range(layers[0], highest + 1),
            outliers,
            outliers_at=len(blocks) - 1,
            num=self.top_k,
        )
        settled.calibration_pictures = 0
        log.info(
            "attn.neurons=%s, found on %d pictures with %d outlier tokens",
            str([list(pair) for pair in settled.neurons]).replace(" ", ""),
            *counted,
        )
        return settled

    def _outliers(self, x: Tensor) -> Tensor:
        prefix = x.shape[1] - math.isqrt(x.shape[1]) ** 2
        found = ops.norm_ratio(x, prefix=prefix, ratio=self.outlier_ratio)
        if found.any():
            return found
        log.warning(
            "attn.outlier_ratio=%s: no patch token of the %d calibration pictures is so far above "
            "the median; the one of largest norm of each picture stands in, so that the neurons "
            "found are no register neurons",
            self.outlier_ratio,
            len(x),
        )
        largest = ops.patch_norms(x, prefix).argmax(1, keepdim=True) + prefix
        return found.scatter(1, largest, True)

    def hooks(
        self,
        blocks: Sequence[nn.Module],
        layers: Sequence[int],
        *,
        enabled: Callable[[], bool],
        prefix: Callable[[Tensor], int],
        kept: Callable[[], Tensor | None],
    ) -> Iterable[Handle]:
        """Append the tokens, drop them again, and move the neurons' values in between.

        Raises:
            ValueError: neurons were neither given nor found, do not exist, or lie in a block
                before the tokens are there.
        """
        if self.neurons is None:
            raise ValueError(
                "attn.neurons=null: register neurons are found by a run, on its calibration "
                "pictures; expected [[block, neuron], ...]."
            )
        for layer, neuron in self.neurons:
            if not layers[0] <= layer < len(blocks):
                raise ValueError(
                    f"attn.neurons={[[layer, neuron]]}: expected a block from {layers[0]}, where "
                    f"the registers are appended (the first of attn.layers), to {len(blocks) - 1}."
                )
            width = mlp_output(blocks[layer]).in_features
            if neuron >= width:
                raise ValueError(
                    f"attn.neurons={[[layer, neuron]]}: block {layer} has {width} neurons, "
                    f"0 to {width - 1}."
                )
        turn, extra = tokens_first(blocks[layers[0]]), self.num_extra_tokens

        def append(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not enabled():
                return None
            self._check_places(kwargs)
            x = hidden(args, kwargs, type(block).__name__, turn=turn)
            more = x.new_zeros((len(x), extra, x.shape[2]))
            return with_hidden(args, kwargs, torch.cat([x, more], dim=1), turn=turn)

        def drop(block: nn.Module, args: Any, out: Any) -> Any:  # noqa: ARG001
            if not enabled():
                return None
            x = given(out, turn=turn)
            return with_given(out, x[:, : x.shape[1] - extra], turn=turn)

        found = [blocks[layers[0]].register_forward_pre_hook(append, with_kwargs=True)]
        found.append(blocks[-1].register_forward_hook(drop))
        for layer in sorted({layer for layer, _ in self.neurons}):
            some = sorted({neuron for place, neuron in self.neurons if place == layer})

            def move(mlp: nn.Module, args: tuple[Tensor], some: list[int] = some) -> Any:  # noqa: ARG001
                if not enabled():
                    return None
                said = args[0].transpose(0, 1) if turn else args[0]
                out = self._moved(said, some, prefix(said), kept())
                return (out.transpose(0, 1) if turn else out, *args[1:])

            found.append(mlp_output(blocks[layer]).register_forward_pre_hook(move))
        return found

    def _moved(self, said: Tensor, some: list[int], prefix: int, kept: Tensor | None) -> Tensor:
        """Activations `[b n f]` with some neurons' values moved from patches to added tokens."""
        extra = self.num_extra_tokens
        index = torch.tensor(some, device=said.device)
        mine = said[..., index]
        host, patches = mine[:, :prefix], mine[:, prefix:-extra]
        real = None if kept is None else kept[:, prefix:-extra].expand(len(said), -1)
        taken = ops.strongest_activation(patches, real)[:, None].expand(-1, extra, -1)
        if self.mode == "zero":
            patches = torch.zeros_like(patches)
        elif self.mode == "mean":
            total = patches if real is None else patches.masked_fill(~real[..., None], 0)
            count = patches.shape[1] if real is None else real.sum(1)[:, None, None].clamp(min=1)
            patches = (total.sum(1, keepdim=True) / count).expand_as(patches)
        moved = torch.cat([host, patches, taken], dim=1)
        return said.index_copy(2, index, moved)

    def _check_places(self, kwargs: dict[str, Any]) -> None:
        for name, what in PLACES.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"attn={self.name} cannot honour the {what} of this host ({name}): added "
                    "tokens have no place in it; expected a host whose position encoding is "
                    "added to its tokens."
                )


def _read_neurons(neurons: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    try:
        found = [tuple(pair) for pair in neurons]
    except TypeError:
        found = []
    whole = all(is_whole(i) and i >= 0 for pair in found for i in pair)
    if not found or any(len(pair) != 2 for pair in found) or not whole:
        raise ValueError(f"attn.neurons={neurons!r}: expected [[block, neuron], ...] or null.")
    return [(layer, neuron) for layer, neuron in found]
