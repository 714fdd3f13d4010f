"""Landmarks block by block, as few as a budget of error allows, and checked to keep it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.attn.exact import ExactAttention
from fna_lab.attn.layers import parse_layers
from fna_lab.attn.reduced import ReducedAttention
from fna_lab.backbone.blocks import find_blocks
from fna_lab.backbone.named import resolve
from fna_lab.backbone.patch import Patch, patch
from fna_lab.hosts import noted, out_projection
from fna_lab.settings import check_integer, check_number

log = logging.getLogger(__name__)

CANDIDATES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROUNDS = 12
FINEST = 3  # blocks that are tried alone before the budget is said to be out of reach
REACH_PICTURES = 2  # enough to tell blocks apart; the choice itself is checked on all

Features = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Plan:
    """Which blocks are approximated, with how many landmarks, and what that costs.

    Attributes:
        budget: what was asked for.
        error: what was measured, end to end on the calibration pictures, at most the budget.
        pictures: how many pictures that were.
        landmarks: numbers of landmarks by block; the other blocks stay exact.
        errors: relative error of the attention output after the out-projection by block, with
            these landmarks, on exact inputs.
        gflops: attention of one picture in all blocks, selection included.
        exact_gflops: the same of exact attention.
        checks: how many choices were measured end to end.
    """

    budget: float
    error: float
    pictures: int
    landmarks: dict[int, int]
    errors: dict[int, float]
    gflops: float
    exact_gflops: float
    checks: int

    @property
    def settings(self) -> dict[str, Any]:
        """What `fna_lab.patch` takes: `layers` and `num_landmarks`."""
        return {"layers": sorted(self.landmarks), "num_landmarks": self.landmarks}


@torch.no_grad()
def solve_budget(
    model: nn.Module,
    pictures: Tensor,
    attn: str | AttentionVariant = "fna",
    *,
    budget: float,
    layers: Any = "all",
    features: Features | None = None,
    candidates: Sequence[int] = CANDIDATES,
    patching: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """The cheapest numbers of landmarks that keep the features within a budget of error.

        found = fna_lab.solve_budget(model, pictures, "fna", budget=0.01)
        patched = fna_lab.patch(model, "fna", **found.settings)

    The promise, measured on the calibration pictures before it is given: for every one of them
    and every kind of feature, 1 - (mean cosine with exact features over its tokens) is at most
    the budget.

    How: one pass with exact attention measures each block and candidate on exact inputs, after
    the out-projection; one pass a block tells how far its error reaches the features; errors that
    are far from one another add up, so the cheapest choice (in FLOPs, selection included) under a
    limit of the sum is a knapsack; the limit is moved until the choice, run end to end, keeps the
    budget, and no looser one that was tried does.

    Args:
        model: a timm, open_clip or transformers ViT, or a model that contains one.
        pictures: normalised pictures `[b 3 h w]`, as the model takes them.
        attn: a variant with landmarks, by name or as an object.
        budget: 0 < budget < 1.
        layers: blocks that may be approximated, in any way of writing them.
        features: pictures -> features to compare, `[b t c]` each; None = the output of the last
            block, CLS and patch tokens apart.
        candidates: numbers of landmarks to choose from.
        patching: more for `fna_lab.patch`, such as `mask` and `blocks`.
        **settings: of the variant, where `attn` is a name.

    Raises:
        ValueError: a setting is out of range, the variant has no landmarks, or no choice that is
            cheaper than exact attention keeps the budget.
    """
    if "num_landmarks" in settings:
        raise ValueError(
            f"num_landmarks={settings['num_landmarks']}: the budget chooses the landmarks; "
            "expected candidates= to choose from, or none."
        )
    if not isinstance(pictures, Tensor) or pictures.ndim != 4 or len(pictures) == 0:
        said = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
        raise ValueError(f"pictures: expected a few pictures [b 3 h w], got {said}.")
    candidates = tuple(candidates)
    if not candidates:
        raise ValueError("candidates=(): expected at least one number of landmarks.")
    for num in candidates:
        check_integer("candidates", num)
    variant = check_budget(resolve(attn, AttentionVariant, "fna_lab.attn", settings), budget)
    variant = variant.with_landmarks(1)
    variant.guard = None  # the promise is the formula's, whatever a guard may better
    more = dict(patching or {})
    path, blocks = find_blocks(model, more.pop("blocks", None))
    more["blocks"] = path
    allowed = parse_layers(layers, len(blocks), setting="attn.layers")
    bench = _Bench(model, pictures, variant, blocks, features, more)

    table = bench.measure(candidates, allowed)
    far = bench.reach(table)
    options = {layer: [None, *rows] for layer, rows in table.errors.items()}
    costs = [[table.costs[num] for num in options[i]] for i in options]
    errors = [[far[i] * (table.errors[i][num] ** 2 if num else 0.0) for num in options[i]]
              for i in options]  # fmt: skip
    known: dict[tuple[int, ...], float] = {}
    best: tuple[float, dict[int, int]] | None = None
    holds, fails, limit = 0.0, math.inf, float(budget)
    for _ in range(ROUNDS):
        picks = tuple(ops.cheapest_choice(costs, errors, limit))
        choice = {i: options[i][p] for i, p in zip(options, picks, strict=True)}
        chosen = {layer: num for layer, num in choice.items() if num}
        if picks not in known:
            known[picks] = bench.error(chosen)
            log.debug("budget: limit %.3g, %s: %.3g", limit, chosen, known[picks])
        cost = sum(row[p] for row, p in zip(costs, picks, strict=True))
        if known[picks] <= budget:
            holds = max(holds, limit)
            if chosen and (best is None or cost < best[0]):
                best = cost, chosen
        else:
            fails = min(fails, limit)
        if (
            fails < 1.03 * holds
            or not any(p for p in picks)
            and holds == limit
            and fails < math.inf
        ):
            break
        if not holds:
            limit = fails * min(0.5, max(0.02, 0.9 * budget / known[picks]))
        elif fails == math.inf:
            limit = holds * min(8.0, max(1.5, budget / max(known[picks], 1e-12)))
        else:
            limit = math.sqrt(holds * fails)
    if best is None:
        # The least that can be done is one block at its finest; the limits may have missed it.
        alone = [
            (error, i, num)
            for i, row in zip(options, errors, strict=True)
            for error, num in sorted(zip(row[1:], options[i][1:], strict=True))[:1]
        ]
        for _, layer, num in sorted(alone)[:FINEST]:
            picks = tuple(options[i].index(num) if i == layer else 0 for i in options)
            known[picks] = bench.error({layer: num})
            if known[picks] <= budget and best is None:
                cost = sum(row[p] for row, p in zip(costs, picks, strict=True))
                best = cost, {layer: num}
    if best is None:
        least, picks = min((error, picks) for picks, error in known.items() if any(picks))
        closest = {i: options[i][p] for i, p in zip(options, picks, strict=True) if p}
        finest = max(num for row in options.values() for num in row if num)
        raise ValueError(
            f"attn.budget={budget}: no choice of landmarks keeps it on the {len(pictures)} "
            f"calibration pictures; the smallest error that was measured is {least:.3g} "
            f"(landmarks by block: {closest}; more than {finest} cost more than exact attention, "
            "or were no candidates). Raise the budget to that, or use attn=exact."
        )
    cost, chosen = best
    rest = len(blocks) - len(options)
    picks = tuple(options[i].index(chosen.get(i)) for i in options)
    return Plan(
        budget=float(budget),
        error=known[picks],
        pictures=len(pictures),
        landmarks=chosen,
        errors={layer: table.errors[layer][num] for layer, num in chosen.items()},
        gflops=(cost + rest * table.costs[None]) / 1e9,
        exact_gflops=len(blocks) * table.costs[None] / 1e9,
        checks=len(known),
    )


def check_budget(attn: AttentionVariant, budget: object) -> ReducedAttention:
    """Refuse, before any picture is read, a budget or a variant that cannot be.

    Returns:
        The variant.

    Raises:
        ValueError: the budget is no number between 0 and 1, or the variant has no landmarks.
    """
    if budget is None:
        raise ValueError("attn.layers=auto needs a budget of error, such as attn.budget=0.01.")
    check_number("attn.budget", budget, "a number between 0 and 1", above=0, below=1)
    if not isinstance(attn, ReducedAttention) or not attn.counts_at_will:
        raise ValueError(
            f"attn.layers=auto: attn={attn.name} has no landmarks to choose freely; use one that "
            "has, such as attn=fna."
        )
    return attn


@dataclass
class _Table:
    """By block and number of landmarks: error on exact inputs; by number: FLOPs (None = exact)."""

    errors: dict[int, dict[int, float]]
    costs: dict[int | None, int]


class _Bench:
    """Runs the model on the calibration pictures under one choice after another."""

    def __init__(
        self,
        model: nn.Module,
        pictures: Tensor,
        variant: ReducedAttention,
        blocks: Sequence[nn.Module],
        features: Features | None,
        patching: dict[str, Any],
    ) -> None:
        self.model = model
        self.pictures = pictures
        self.variant = variant
        self.blocks = blocks
        self.features = features
        self.patching = patching
        self.prefix, self.has_cls = 0, False
        # Exact attention, in whose place the same token classes are looked for.
        self.exact = ExactAttention()
        self.exact.token_classes = variant.token_classes
        self.wanted: list[Tensor] = []

    def measure(self, candidates: Sequence[int], allowed: Sequence[int]) -> _Table:
        """One exact pass that tries every candidate at every block on the way."""
        table = _Table({}, {})
        plain = copy.copy(self.exact)

        def attend(_: AttentionVariant, q: Tensor, k: Tensor, v: Tensor, at: Context) -> Tensor:
            self.prefix, self.has_cls = at.num_prefix_tokens, at.has_cls
            exact = plain(q, k, v, replace(at, shared={}))
            heads, tokens, dim = q.shape[1:]
            table.costs[None] = ops.attention_flops(tokens, heads, dim)
            if at.layer not in allowed:
                return exact
            weight = out_projection(self.blocks[at.layer]).weight
            right = (exact.transpose(1, 2).flatten(2) @ weight.mT).flatten(1).norm(dim=1)
            row = table.errors[at.layer] = {}
            for num in candidates:
                if not at.num_prefix_tokens < num <= tokens:
                    continue  # a variant may want every prefix token to stand for itself
                twin = self.variant.with_landmarks(num)
                shape = {"heads": heads, "head_dim": dim, "channels": at.x.shape[-1]}
                table.costs[num] = twin.flops(tokens, **shape, layers=1)
                if table.costs[num] >= table.costs[None]:
                    continue
                out = twin(q, k, v, replace(at, shared={}, stopwatch=None)) - exact
                wrong = (out.transpose(1, 2).flatten(2) @ weight.mT).flatten(1).norm(dim=1)
                row[num] = float((wrong / right).square().mean().sqrt())
            return exact

        with patch(self.model, self.exact, layers="all", **self.patching) as patched:
            patched.meter = attend
            self.wanted = self._run(patched)
        if not any(table.errors.values()):
            raise ValueError(
                f"attn.layers=auto: attn={self.variant.name} is at no number of landmarks cheaper "
                "than exact attention on pictures of this size."
            )
        return table

    def reach(self, table: _Table) -> dict[int, float]:
        """By block, error of the features for a squared error of one of its attention."""
        found = {}
        for layer, row in table.errors.items():
            num = sorted(row)[len(row) // 2]
            error = self.error({layer: num}, self.pictures[:REACH_PICTURES])
            found[layer] = error / max(row[num] ** 2, 1e-12)
        return found

    def error(self, landmarks: dict[int, int], pictures: Tensor | None = None) -> float:
        """1 - cosine of the features with the exact ones: of the worst picture and kind."""
        if not landmarks:
            return 0.0
        variant = self.variant.with_landmarks(landmarks)
        with patch(self.model, variant, layers=sorted(landmarks), **self.patching) as patched:
            found = self._run(patched, pictures)
        errors = []
        for exact, b in zip(self.wanted, found, strict=True):
            a = exact[: len(b)]
            cosine = torch.cosine_similarity(a.double(), b.double(), dim=-1)
            apart = 1 - torch.where((a == b).all(-1), 1.0, cosine)
            there = a.any(-1)  # padding has no features, and must not count as exact
            errors.append((apart * there).sum(1) / there.sum(1).clamp(min=1))
        return float(torch.stack(errors).nan_to_num(1.0).max())

    def _run(self, patched: Patch, pictures: Tensor | None = None) -> list[Tensor]:
        pictures = self.pictures if pictures is None else pictures
        with patched.uncounted():
            if self.features is not None:
                return list(self.features(pictures))
            with noted(self.blocks[-1:]) as seen:
                self.model(pictures)
        x = seen[-1]
        patches = x[:, self.prefix : x.shape[1] - self.variant.num_extra_tokens]
        return [x[:, :1], patches] if self.has_cls else [patches]
