"""Retrieval and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fna_lab.ops.checks import check_float


def recall_at_k(
    similarity: Tensor, owner: Tensor, ks: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Recall at k of text-to-image and image-to-text retrieval.

    `t2i`: share of captions whose own picture is among the k best. `i2t`: share of pictures with
    any own caption among the k best. Equal scores keep the order of the input.

    Args:
        similarity: `[pictures, captions]`.
        owner: the picture that each caption belongs to, long `[captions]`.
        ks: ranks k, each at least 1.

    Returns:
        `{"t2i": {k: float}, "i2t": {k: float}}`, each from 0 to 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a k is below 1.

    Source: the protocol of Radford et al. 2021 (CLIP) and CLIP_benchmark.
    """
    check_float("similarity", similarity, 2, "[pictures, captions]")
    if owner.shape != (similarity.shape[1],):
        raise ValueError(
            f"Expected owner to have shape ({similarity.shape[1]},), got {tuple(owner.shape)}."
        )
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"Expected ks to be integers >= 1, got {ks!r}.")
    pictures = torch.arange(similarity.shape[0], device=owner.device)
    own = owner[None] == pictures[:, None]  # [pictures, captions]
    found = {}
    for name, scores, hits in (("t2i", similarity.mT, own.mT), ("i2t", similarity, own)):
        most = min(max(ks), scores.shape[1])
        ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
        right = hits.gather(1, ranked).cummax(1).values  # [queries, most]
        found[name] = {k: right[:, min(k, most) - 1].double().mean().item() for k in ks}
    return found


def knn_probabilities(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Weighted nearest-neighbour votes: softmax(similarity / T) summed for each class.

    Args:
        queries: unit vectors `[q c]`.
        bank: unit vectors `[m c]`.
        labels: classes of the bank, long `[m]`.
        num_classes: number of classes.
        ks: numbers of neighbours, each from 1 to m.
        temperature: T > 0.

    Returns:
        For every k, votes `[q classes]`; they need not sum to 1 for k below the largest.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a k exceeds the bank, or T <= 0.

    Source: Wu et al. 2018; the k-NN protocol of DINOv2 (Oquab et al. 2024).
    """
    check_float("queries", queries, 2, "[q c]")
    check_float("bank", bank, 2, "[m c]")
    if labels.shape != (bank.shape[0],):
        raise ValueError(
            f"Expected labels to have shape ({bank.shape[0]},), got {tuple(labels.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"Expected temperature to be > 0, got {temperature!r}.")
    if not ks or any(not 1 <= k <= bank.shape[0] for k in ks):
        raise ValueError(f"Expected each k from 1 to {bank.shape[0]} (the bank), got {list(ks)}.")
    near, index = (queries @ bank.mT).topk(max(ks), dim=1)
    votes = (near / temperature).softmax(1)
    classes = labels[index]
    return {
        k: votes.new_zeros((queries.shape[0], num_classes)).scatter_add_(
            1, classes[:, :k], votes[:, :k]
        )
        for k in ks
    }
