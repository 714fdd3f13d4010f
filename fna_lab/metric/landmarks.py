"""Which landmarks attention takes: where they lie, of which class, and how well they cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.landmarks.base import LandmarkSampler, source_points
from fna_lab.attn.reduced import LandmarkAttention
from fna_lab.metric.mass import by_class

Attend = Callable[[AttentionVariant, Tensor, Tensor, Tensor, Context], Tensor]


class LandmarkLook:
    """Lets a variant attend, and notes which landmarks it took.

    Args:
        members: classes of the tokens, bool `[b n k]`.
        first: the block where other samplers are asked, too.
        samplers: those, by name.
        inner: attends in the place of the variant; None = the variant itself.

    Attributes:
        facts: `landmarks/<fact>/<block>`, each `[b]`: how many of each class (NaN where a picture
            has none), and `coverage`, the radius of the landmarks in radii of exact farthest
            points; means over heads that sample on their own. `coverage_<sampler>` at `first`.
        picks: at `first`, landmarks long `[b m]` by sampler, `own` the variant's; of the first
            head where heads sample on their own.
        coverage: of these, `[b]`.
        clusters: the landmark of each token there, long `[b n]`; None without clusters.
    """

    def __init__(
        self,
        members: Tensor,
        first: int,
        samplers: Mapping[str, LandmarkSampler],
        inner: Attend | None = None,
    ) -> None:
        self.members = members
        self.first = first
        self.samplers = samplers
        self.inner = inner
        self.facts: dict[str, Tensor] = {}
        self.picks: dict[str, Tensor] = {}
        self.coverage: dict[str, Tensor] = {}
        self.clusters: Tensor | None = None

    def __call__(
        self, variant: AttentionVariant, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        attend = variant if self.inner is None else _within(self.inner, variant)
        out = attend(q, k, v, context)
        assert isinstance(variant, LandmarkAttention)
        picks, clusters = variant.taken(q, context)
        found = {"own": picks}
        if context.layer == self.first:
            found |= {
                name: variant.taken_by(sampler, q, k, context)
                for name, sampler in self.samplers.items()
            }
            self.picks = {name: _of_one_head(p) for name, p in found.items()}
            self.clusters = None if clusters is None else _of_one_head(clusters)
        keys, _ = variant.keys(q, context)
        points = source_points(variant.source, q, k, context, per_head=variant.per_head)
        for name, value in _coverage(points, found, keys).items():
            fact = "coverage" if name == "own" else f"coverage_{name}"
            self.facts[f"landmarks/{fact}/{context.layer:02d}"] = value
            if context.layer == self.first:
                self.coverage[name] = value
        for name, value in by_class("landmarks", class_counts(picks, self.members)).items():
            self.facts[f"{name}/{context.layer:02d}"] = value
        return out


def class_counts(picks: Tensor, members: Tensor) -> Tensor:
    """How many tokens of each class are landmarks, repeats counted once.

    Args:
        picks: long `[b m]`, or per head `[b h m]`: then the mean over heads.
        members: bool `[b n k]`.

    Returns:
        `[b k]`, NaN where the picture has no token of the class.
    """
    heads = picks if picks.ndim == 3 else picks[:, None]
    # float32 whatever Lightning's precision has made the default.
    shape = (*heads.shape[:2], members.shape[1])
    taken = torch.zeros(shape, device=picks.device, dtype=torch.float32).scatter_(2, heads, 1.0)
    counts = (taken @ members.float()).mean(1)
    return counts.masked_fill(~members.any(1), torch.nan)


def _coverage(
    points: Tensor, picks: Mapping[str, Tensor], allowed: Tensor | None
) -> dict[str, Tensor]:
    """Radii in those of exact farthest points, `[b]`; NaN where these leave nothing uncovered."""
    first = next(iter(picks.values()))
    heads = first.shape[1] if first.ndim == 3 else 1
    if allowed is not None:
        allowed = allowed.repeat_interleave(heads, dim=0)
    best = ops.farthest_points(points, first.shape[-1], allowed=allowed)
    best = ops.coverage_radius(points, best, allowed)
    found = {}
    for name, one in picks.items():
        radius = ops.coverage_radius(points, one.flatten(0, 1) if one.ndim == 3 else one, allowed)
        ratio = torch.where(best > 0, radius / best, torch.nan)
        found[name] = ratio.unflatten(0, (-1, heads)).mean(1)
    return found


def _of_one_head(index: Tensor) -> Tensor:
    return index[:, 0] if index.ndim == 3 else index


def _within(inner: Attend, variant: AttentionVariant) -> Callable[..., Tensor]:
    return lambda q, k, v, context: inner(variant, q, k, v, context)
