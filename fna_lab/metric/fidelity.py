"""How close a patched model stays to its exact self."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fna_lab import ops


class LayerError(Metric):
    """Mean relative error of the hidden states, layer by layer.

    For each picture and layer, ||patched - exact|| / ||exact|| over all tokens.

    Args:
        layers: number of layers.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        zeros = torch.zeros(layers, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, errors: Tensor) -> None:
        """Add errors `[b layers]`."""
        self.total += errors.double().sum(0)
        self.count += errors.shape[0]

    def compute(self) -> Tensor:
        """Mean errors `[layers]`."""
        return self.total / self.count


class NeighbourAgreement(Metric):
    """Share of pictures whose nearest other picture is the same in both feature spaces."""

    full_state_update = False
    higher_is_better = True
    exact: list[Tensor]
    patched: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("exact", [], dist_reduce_fx="cat")
        self.add_state("patched", [], dist_reduce_fx="cat")

    def update(self, exact: Tensor, patched: Tensor) -> None:
        """Add features `[b e]` of the same pictures."""
        self.exact.append(F.normalize(exact.double(), dim=-1))
        self.patched.append(F.normalize(patched.double(), dim=-1))

    def compute(self) -> Tensor:
        """The share, from 0 to 1."""
        nearest = []
        for features in (dim_zero_cat(self.exact), dim_zero_cat(self.patched)):
            found = []
            for rows in torch.arange(len(features), device=features.device).split(1024):
                similarity = features[rows] @ features.mT  # all rows at once: O(n^2) memory
                found.append(similarity.scatter_(1, rows[:, None], -torch.inf).argmax(1))
            nearest.append(torch.cat(found))
        return (nearest[0] == nearest[1]).double().mean()


def relative_errors(
    exact: list[Tensor], patched: list[Tensor], kept: Tensor | None = None
) -> Tensor:
    """||patched - exact|| / ||exact|| of each picture and layer.

    Args:
        exact: hidden states of the layers, each `[b n c]`.
        patched: the same of the patched model; tokens appended behind are left out.
        kept: tokens that are no padding, bool `[b n]`; None = all.

    Returns:
        `[b layers]`, float64.
    """
    patched = [p[:, : e.shape[1]] for e, p in zip(exact, patched, strict=True)]
    if kept is not None:
        exact, patched = ([x * kept[..., None] for x in some] for some in (exact, patched))
    return torch.stack(
        [
            (p.double() - e.double()).flatten(1).norm(dim=1)
            / e.double().flatten(1).norm(dim=1).clamp_min(1e-300)
            for e, p in zip(exact, patched, strict=True)
        ],
        dim=1,
    )


def mean_over(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean of patch tokens `[b p]` -> `[b]`, over those of `kept` bool `[b n]`; None = all."""
    if kept is None:
        return values.mean(1)
    mine = ops.patches_of(kept, values)
    return (values * mine).sum(1) / mine.sum(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of vectors `[... c]` in float64; 1 for equal ones, zero vectors included."""
    a, b = a.double(), b.double()
    same = (a == b).all(-1)
    return torch.where(same, 1.0, F.cosine_similarity(a, b, dim=-1))
