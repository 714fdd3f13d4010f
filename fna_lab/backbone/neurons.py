"""MLP neurons of a host: read some of them, and find its register neurons by a few pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fna_lab import ops
from fna_lab.attn.neurons import firing_neurons
from fna_lab.backbone.blocks import Layout, find_blocks
from fna_lab.hosts import mlp_output, tokens_first

Run = Callable[[Tensor], object]


class NeuronTap:
    """Keeps what some MLP neurons said in the last forward pass.

    Args:
        blocks: the host's blocks.
        neurons: `(layer, neuron)` pairs.

    Attributes:
        handles: of its hooks, for who removes them.

    Raises:
        ValueError: a block or neuron does not exist.
    """

    def __init__(self, blocks: Sequence[nn.Module], neurons: Sequence[tuple[int, int]]) -> None:
        self.neurons = list(neurons)
        self.handles: list[RemovableHandle] = []
        self._said: dict[int, Tensor] = {}
        self._turn = tokens_first(blocks[0])
        picks: dict[int, list[int]] = {}
        for layer, neuron in self.neurons:
            picks.setdefault(layer, []).append(neuron)
        for layer, some in picks.items():
            self._check(blocks, layer, some)
        for layer, some in picks.items():
            keep = partial(self._keep, layer, some)
            self.handles.append(mlp_output(blocks[layer]).register_forward_pre_hook(keep))

    def _keep(
        self,
        layer: int,
        some: list[int],
        mlp: nn.Module,  # noqa: ARG002
        args: tuple[Tensor, ...],
    ) -> None:
        said = args[0][..., some].detach()  # only tells which tokens stand out
        self._said[layer] = said.transpose(0, 1) if self._turn else said

    def read(self, only: Tensor | None = None, *, again: int = 0) -> Tensor | None:
        """The activations in the order of the list, `[b n k]`; None without any neurons.

        Args:
            only: pictures of the batch that are asked for, long `[p]`; None = all.
            again: first block that ran again, for these pictures alone.
        """
        if not self.neurons:
            return None
        columns = {}
        for layer, said in self._said.items():
            said = said if only is None or layer >= again else said[only]
            columns[layer] = iter(said.unbind(-1))
        return torch.stack([next(columns[layer]) for layer, _ in self.neurons], dim=-1)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @staticmethod
    def _check(blocks: Sequence[nn.Module], layer: int, some: Sequence[int]) -> None:
        if not 0 <= layer < len(blocks):
            raise ValueError(
                f"mask.detector.neurons: block {layer} does not exist; the host has "
                f"{len(blocks)}, 0 to {len(blocks) - 1}."
            )
        width = mlp_output(blocks[layer]).in_features
        if not 0 <= min(some) <= max(some) < width:
            raise ValueError(
                f"mask.detector.neurons={[[layer, one] for one in some]}: block {layer} has "
                f"{width} neurons, 0 to {width - 1}."
            )


def find_register_neurons(
    model: nn.Module,
    pictures: Tensor,
    *,
    num: int = 10,
    run: Run | None = None,
    blocks: str | None = None,
    prefix: int | None = None,
    outliers_at: int = -1,
    outliers: Callable[[Tensor, int], Tensor] | None = None,
    highest: int | None = None,
    sparse_below: float | None = None,
    kept: Tensor | None = None,
) -> list[tuple[int, int]]:
    """The MLP neurons that fire most where the outlier tokens of these pictures are.

    See `firing_neurons`, which does it.

    Args:
        model: a timm, open_clip or transformers ViT.
        pictures: normalised pictures `[b 3 h w]`; published with 100 to 500.
        num: how many neurons.
        run: runs the model on pictures; None = calls it.
        blocks: dotted path of the host's list of blocks, where it is not found by itself.
        prefix: number of prefix tokens; None = as the host says.
        outliers_at: block whose output shows the outlier tokens; -1 = the last.
        outliers: hidden states `[b n c]` and number of prefix tokens -> bool `[b n]`; None =
            patch tokens of more than three times the picture's median norm.
        highest: last block whose neurons are looked at; None = up to where outliers are read.
        sparse_below: see `ops.register_neuron_scores`.
        kept: tokens that are no padding, bool `[b n]`, of which alone outliers are; None = all.

    Returns:
        `(layer, neuron)` pairs, the highest score first.

    Raises:
        ValueError: no picture has an outlier token, a block does not exist, or it has no MLP.

    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", algorithm 1.
    """
    path, found = find_blocks(model, blocks)
    depth = len(found)
    if not -depth <= outliers_at < depth:
        raise ValueError(
            f"outliers_at={outliers_at}: the host has {depth} blocks, 0 to {depth - 1}."
        )
    last = outliers_at % depth
    highest = last if highest is None else highest
    if not 0 <= highest < depth:
        raise ValueError(f"highest={highest}: the host has {depth} blocks, 0 to {depth - 1}.")
    prefix = Layout(model, path).prefix if prefix is None else prefix
    run = model if run is None else run

    def marked(x: Tensor) -> Tensor:
        tokens = _heavy(x, prefix, kept) if outliers is None else outliers(x, prefix)
        tokens = tokens if kept is None else tokens & kept.to(tokens.device)
        if not tokens.any():
            raise ValueError(
                f"None of the {len(tokens)} pictures has an outlier token after block {last}, so "
                "there is nothing that register neurons could be found by; expected a host with "
                "massive tokens, or a lower threshold."
            )
        return tokens

    return firing_neurons(
        lambda: run(pictures),
        found,
        range(highest + 1),
        marked,
        outliers_at=last,
        num=num,
        sparse_below=sparse_below,
    )


def _heavy(x: Tensor, prefix: int, kept: Tensor | None) -> Tensor:
    return ops.norm_ratio(x, prefix=prefix, ratio=3.0, kept=kept)
