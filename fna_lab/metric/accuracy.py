"""Accuracy, its mean over classes, and the guesses of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from fna_lab import ops


class ClassAccuracy(Metric):
    """Top-1 accuracy, over pictures or balanced over the classes that occur.

    Args:
        num_classes: number of classes.
        balanced: mean of the recalls of the classes that occur, each class with equal weight.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    count: Tensor

    def __init__(self, num_classes: int, *, balanced: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.balanced = balanced
        zeros = torch.zeros(num_classes, dtype=torch.long)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("count", zeros.clone(), dist_reduce_fx="sum")

    def update(self, guess: Tensor, label: Tensor) -> None:
        """Add predictions and labels, long `[b]`."""
        size = self.num_classes
        self.hits += torch.bincount(label[guess == label], minlength=size)
        self.count += torch.bincount(label, minlength=size)

    def compute(self) -> Tensor:
        """From 0 to 1."""
        if not self.balanced:
            return self.hits.sum().double() / self.count.sum()
        seen = self.count > 0
        return (self.hits[seen].double() / self.count[seen]).mean()


def knn_guesses(
    features: Tensor,
    bank: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, Tensor]:
    """Classes by the weighted votes of the k nearest neighbours, for every k.

    Args:
        features: unit vectors `[b c]`.
        bank: unit vectors `[m c]` and their classes `[m]`.
        num_classes: number of classes.
        ks: numbers of neighbours.
        temperature: of the votes.

    Returns:
        `{"knn<k>": long [b]}`.
    """
    votes = ops.knn_probabilities(
        features, *bank, num_classes=num_classes, ks=ks, temperature=temperature
    )
    return {f"knn{k}": vote.argmax(1) for k, vote in votes.items()}
