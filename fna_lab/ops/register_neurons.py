"""Register neurons: the few MLP neurons that fire where massive tokens appear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_integer


def register_neuron_scores(
    activations: Tensor, outliers: Tensor, *, sparse_below: float | None = None
) -> Tensor:
    """How strongly each neuron of one MLP fires at the outlier tokens.

    score[n] = mean over the outlier tokens of a picture of |activation of n|, and then the mean
    over the pictures that have outliers.

    Args:
        activations: after the MLP's activation function `[b n f]`.
        outliers: the outlier tokens of each picture, bool `[b n]`.
        sparse_below: keep only neurons that lie below this value in at least half of the tokens
            (0.5 as published); the others score 0. None = keep all.

    Returns:
        `[f]`, in at least float32; zeros where no picture has an outlier.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", section 3.
    """
    check_float("activations", activations, 3, "[b n f]")
    check_bool("outliers", outliers, tuple(activations.shape[:2]))
    wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
    weight = outliers.to(wide.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)  # [b n], a picture's mean
    pictures = outliers.any(1).sum().clamp(min=1)
    scores = torch.einsum("bn,bnf->f", weight, wide.abs()) / pictures
    if sparse_below is None:
        return scores
    quiet = (wide < sparse_below).double().mean((0, 1)) >= 0.5
    return scores.masked_fill(~quiet, 0.0)


def top_register_neurons(
    scores: Tensor, num: int, *, layers: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """The neurons of all layers with the highest scores.

    Args:
        scores: `[l f]`, a row a layer.
        num: how many; 10 as published for CLIP B/16, 45 for DINOv2-L.
        layers: the block of each row; None = 0, 1, 2, ... Leave out the rows of late blocks, as
            published (up to 5 of 12 for CLIP B/16, 17 of 24 for DINOv2-L).

    Returns:
        `(layer, neuron)` pairs, the highest score first; ties go to the lower layer and neuron.

    Raises:
        TypeError: `scores` is not a floating tensor.
        ValueError: shapes do not fit, or `num` is not from 1 to l * f.

    Source: Jiang et al. 2025, algorithm 1.
    """
    check_float("scores", scores, 2, "[l f]")
    check_integer("num", num, most=scores.numel())
    rows = list(range(scores.shape[0])) if layers is None else list(layers)
    if len(rows) != scores.shape[0]:
        raise ValueError(f"Expected layers to name {scores.shape[0]} rows, got {len(rows)}.")
    order = scores.flatten().argsort(descending=True, stable=True)[:num].tolist()
    width = scores.shape[1]
    return [(rows[place // width], place % width) for place in order]


def strongest_activation(activations: Tensor, allowed: Tensor | None = None) -> Tensor:
    """For each neuron the entry with the largest magnitude over the tokens, sign kept.

    Each picture and each neuron has its own, as the published method intends.

    Args:
        activations: `[b n f]`.
        allowed: tokens to look at, bool `[b n]`; None = all.

    Returns:
        `[b f]`; 0 where a picture has no allowed token.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: Jiang et al. 2025, section 4 (test-time registers).
    """
    check_float("activations", activations, 3, "[b n f]")
    if allowed is not None:
        check_bool("allowed", allowed, tuple(activations.shape[:2]))
        activations = activations.masked_fill(~allowed[..., None], 0.0)
    place = activations.abs().argmax(1, keepdim=True)
    return activations.gather(1, place)[:, 0]
