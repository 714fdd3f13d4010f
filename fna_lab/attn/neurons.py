"""The MLP neurons of a host that fire most where its outlier tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fna_lab import ops
from fna_lab.hosts import mlp_output, noted, tokens_first


def firing_neurons(
    forward: Callable[[], object],
    blocks: Sequence[nn.Module],
    layers: Sequence[int],
    outliers: Callable[[Tensor], Tensor],
    *,
    outliers_at: int,
    num: int,
    sparse_below: float | None = None,
) -> list[tuple[int, int]]:
    """The neurons of some blocks with the highest mean activation at outlier tokens.

    The host runs twice, so that no activations are kept: once for the outlier tokens, once for
    the scores, one block at a time.

    Args:
        forward: runs a few pictures through the host, at once or in batches, each time alike.
        blocks: the host's blocks.
        layers: those whose neurons are looked at.
        outliers: hidden states `[b n c]` of all pictures -> their outlier tokens, bool `[b n]`.
        outliers_at: block whose output shows the outlier tokens.
        num: how many neurons; fewer where there are not so many.
        sparse_below: see `ops.register_neuron_scores`; in batches, of each batch.

    Returns:
        `(layer, neuron)` pairs, the highest score first.

    Raises:
        ValueError: a block has no MLP.

    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", algorithm 1.
    """
    with torch.no_grad(), noted([blocks[outliers_at]]) as seen:
        forward()
    tokens = outliers(torch.cat(seen))
    turn = tokens_first(blocks[outliers_at])
    totals: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    done = dict.fromkeys(layers, 0)
    handles = []
    for layer in layers:

        def score(mlp: object, args: tuple[Tensor, ...], layer: int = layer) -> None:  # noqa: ARG001
            said = args[0].transpose(0, 1) if turn else args[0]
            mine = tokens[done[layer] : done[layer] + len(said)]
            done[layer] += len(said)
            found = ops.register_neuron_scores(said, mine, sparse_below=sparse_below)
            totals[layer].append(found * mine.any(1).sum())

        handles.append(mlp_output(blocks[layer]).register_forward_pre_hook(score))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    table = torch.stack([torch.stack(totals[layer]).sum(0) for layer in layers])
    return ops.top_register_neurons(table, min(num, table.numel()), layers=list(layers))
