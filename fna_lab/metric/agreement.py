"""Agreement of sets of tokens and of scores, added up over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from fna_lab import ops


class SetAgreement(Metric):
    """IoU, precision, recall and rank correlation of many pairs at once.

    Sets are counted over all pictures together, so that pictures with many tokens weigh more and
    empty ones nothing; rank correlations are means over the pictures where they are defined.

    Args:
        shape: of the table of pairs, such as `(k, k)`.
    """

    both: Tensor
    first: Tensor
    second: Tensor
    ranks: Tensor
    ranked: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        for name in ("both", "first", "second", "ranked"):
            self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        zeros = torch.zeros(shape, dtype=torch.float64)
        self.add_state("ranks", zeros, dist_reduce_fx="sum")

    def update(
        self,
        first: Tensor,
        second: Tensor,
        first_scores: Tensor,
        second_scores: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        """Add a batch of sets, bool `[*shape b p]`, and of their scores, or what broadcasts.

        `kept` bool `[b p]` marks tokens that are no padding; None = all.
        """
        counts = ops.set_counts(first, second)
        for name, count in zip(("both", "first", "second"), counts, strict=True):
            setattr(self, name, getattr(self, name) + count.sum(-1))
        ranks = ops.rank_correlation(first_scores, second_scores, kept)
        self.ranks = self.ranks + ranks.nan_to_num(0.0).sum(-1)
        self.ranked = self.ranked + (~ranks.isnan()).sum(-1)

    def compute(self) -> dict[str, Tensor]:
        """`iou`, `precision`, `recall`, `spearman`, each of the table's shape; NaN = undefined."""
        found = ops.set_agreement(self.both, self.first, self.second)
        return found | {"spearman": self.ranks / self.ranked}


def by_picture(
    first: Tensor,
    second: Tensor,
    first_scores: Tensor,
    second_scores: Tensor,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """`iou` and `spearman` of each picture, `[*shape b]`; NaN = undefined.

    Args:
        first: sets, bool `[*shape b p]`, or what broadcasts to it.
        second: those that they are compared with.
        first_scores: scores of the first.
        second_scores: scores of the second.
        kept: tokens that are no padding, bool `[b p]`; None = all.
    """
    return {
        "iou": ops.set_agreement(*ops.set_counts(first, second))["iou"],
        "spearman": ops.rank_correlation(first_scores, second_scores, kept),
    }


@dataclass(frozen=True)
class Change:
    """A changed copy of pictures.

    Attributes:
        images: the changed pictures `[b 3 h w]`.
        box: (top, left, bottom, right) of what they show, in shares of the pictures.
        flip: whether they are mirrored left to right.
    """

    images: Tensor
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False

    def places(self, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
        """The patch of the picture's grid under each patch of the changed one, long `[p]`."""
        places = ops.matching_places(grid, other, box=self.box, flip=self.flip)
        return places.to(self.images.device)


def flipped(images: Tensor) -> Change:
    """Mirrored left to right."""
    return Change(images.flip(-1), flip=True)


def cropped(images: Tensor, share: float) -> Change:
    """The middle, that share of the side, enlarged to the size of the pictures."""
    height, width = images.shape[-2:]
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    box = (top / height, left / width, (top + rows) / height, (left + columns) / width)
    cut = images[..., top : top + rows, left : left + columns]
    return Change(_resized(cut, (height, width)), box)


def coarsened(images: Tensor, share: float) -> Change:
    """Drawn with that share of the pixels along a side, and enlarged again."""
    height, width = images.shape[-2:]
    small = _resized(images, (max(1, round(share * height)), max(1, round(share * width))))
    return Change(_resized(small, (height, width)))


def noisy(images: Tensor, noise: float, seeds: Sequence[int]) -> Change:
    """With Gaussian noise of a seed a picture, so that it does not depend on its batch."""
    drawn = [
        torch.randn(
            images.shape[1:],
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float32,
            device="cpu",
        )
        for seed in seeds
    ]
    return Change(images + noise * torch.stack(drawn).to(images))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)
