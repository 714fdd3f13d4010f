"""What an approximation does to the attention of each block, on the block's own q, k and v."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context

CLASSES = ("all", "cls", "register", "patch", "text", "massive", "artifact", "masked")
CLASS_FACTS = (
    "relative_error",
    "cosine",
    "row_sum",
    "row_sum_gap",
    "negative_share",
    "negative_mass",
)
HEAD_FACTS = ("log10_condition", "inverse_residual", "solve_residual")
NAMES = (*(f"{fact}/{name}" for fact in CLASS_FACTS for name in CLASSES), *HEAD_FACTS)


class AttentionError(Metric):
    """Error meter: means over pictures by layer, fact, token class and head.

    An object is called in the place of a block's attention; it measures, and gives what the
    variant gives. See `attention_facts` for the facts.

    Args:
        layers: blocks of the host.
        heads: heads of a block.
        exact: exact attention that honours the same masks.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, layers: int, heads: int, exact: AttentionVariant) -> None:
        super().__init__()
        zeros = torch.zeros(layers, len(NAMES), heads, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", zeros.clone(), dist_reduce_fx="sum")
        self.exact = exact

    @torch.no_grad()
    def attend(
        self, attn: AttentionVariant, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> Tensor:
        """Measure one block of a batch: `[b h n d]` x3 -> the variant's output `[b h n d]`."""
        before = dict(context.shared)
        out = attn(q, k, v, context)
        then = replace(context, shared=before, stopwatch=None)
        self.update(context.layer, attention_facts(attn, self.exact, q, k, v, then, out))
        return out

    def update(self, layer: int, facts: dict[str, Tensor]) -> None:
        """Add facts, `[b h]` each; what is not finite (an empty class) is left out."""
        for name, values in facts.items():
            finite, place = torch.isfinite(values), NAMES.index(name)
            self.total[layer, place] += values.where(finite, 0.0).sum(0)
            self.count[layer, place] += finite.sum(0)

    def compute(self) -> dict[str, dict[str, Any]]:
        """Block -> fact -> token class -> one number a head; `HEAD_FACTS` know no class."""
        found: dict[str, dict[str, Any]] = {}
        means = (self.total / self.count).tolist()
        for layer, place in self.count.amin(-1).nonzero().tolist():
            fact, _, name = NAMES[place].partition("/")
            row, values = found.setdefault(f"{layer:02d}", {}), means[layer][place]
            if name:
                row.setdefault(fact, {})[name] = values
            else:
                row[fact] = values
        return found


def attention_facts(
    attn: AttentionVariant,
    exact: AttentionVariant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    out: Tensor,
) -> dict[str, Tensor]:
    """How far one block's attention lies from exact attention under the same masks.

    A guard has its say in the errors alone: weights and kernel are those of the formula.

    Args:
        attn: the variant.
        exact: exact attention.
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        context: of the block, as it was before the variant ran.
        out: what the variant gave `[b h n d]`.

    Returns:
        Each `[b h]`, float64, NaN where a picture has no such token. `<fact>/<class>`:
        `relative_error`, `cosine` (mean over tokens) of the outputs; `row_sum`, `row_sum_gap`
        (mean |sum - exact sum|), `negative_share`, `negative_mass` of the weights that the variant
        implies, see `ops.weight_facts`. Where it solves with a landmark kernel A:
        `log10_condition`, `solve_residual` ||A X - B|| / ||B||, and where A has no more rows than
        columns `inverse_residual` ||I - A Z|| / ||I||.
    """

    def run(variant: AttentionVariant, values: Tensor) -> Tensor:
        return variant(q, k, values, replace(context, shared=dict(context.shared)))

    wanted = run(exact, v)
    plain, kernel = _overheard(attn, lambda variant: run(variant, v))
    rows = ops.weight_facts(lambda values: run(plain, values), v)
    exact_sum = run(exact, torch.ones_like(v))[..., 0]
    rows["row_sum_gap"] = (rows["row_sum"] - exact_sum).abs()
    kept = context.kept
    if kept is not None:  # no column is padding's
        columns = (kept.sum(1) + context.num_extra_tokens).clamp(min=1)
        rows["negative_share"] *= kept.shape[1] / columns[:, None, None]
    rows["cosine"] = ops.output_cosine(out, wanted)
    facts = {}
    for name, tokens in classes_of(context, attn.num_extra_tokens).items():
        facts[f"relative_error/{name}"] = ops.relative_error(out, wanted, tokens)
        facts |= {f"{fact}/{name}": ops.mean_of_tokens(row, tokens) for fact, row in rows.items()}
    if kernel is not None:
        matrix, values, solution, solve = kernel
        facts["log10_condition"] = ops.condition_number(matrix).log10()
        if matrix.shape[-2] <= matrix.shape[-1]:
            facts["inverse_residual"] = ops.inverse_residual(matrix, solve)
        facts["solve_residual"] = ops.solve_residual(matrix, solution, values)
    return facts


def classes_of(context: Context, num_extra: int = 0) -> dict[str, Tensor]:
    """The tokens of each class that this block has, bool `[b n]`.

    `register` are the host's own and those that a variant appends; `massive` and `artifact` are
    what the variant had detected, `masked` what the mask strategy takes away; the rest of the
    patches is not told apart from them in `patch`.

    Args:
        context: of the block.
        num_extra: tokens that the variant appends.
    """
    batch, n = context.x.shape[:2]
    place = torch.arange(n, device=context.x.device).expand(batch, -1)
    cls = int(context.has_cls)
    extra = place >= n - num_extra
    text = place >= n - num_extra - context.num_suffix_tokens
    found = {"all": place >= 0, "patch": (place >= context.num_prefix_tokens) & ~text}
    if context.num_suffix_tokens:
        found["text"] = text & ~extra
    if cls:
        found["cls"] = place == 0
    if num_extra or context.num_prefix_tokens > cls:
        found["register"] = ((place >= cls) & (place < context.num_prefix_tokens)) | extra
    found |= {name: context.classes[name] for name in CLASSES if name in context.classes}
    if context.removal is not None:
        found["masked"] = context.removal.tokens
    # Padding is in no class; `kept` is of the host's own tokens, and knows no appended ones.
    kept = context.kept
    return found if kept is None else {name: some & (kept | extra) for name, some in found.items()}


Solve = Callable[[Tensor, Tensor], Tensor]


class _Listener:
    """A solver that keeps what it was last asked and what it said."""

    def __init__(self, solver: Solve) -> None:
        self.solver = solver
        self.heard: tuple[Tensor, Tensor, Tensor, Solve] | None = None

    def __call__(self, kernel: Tensor, values: Tensor) -> Tensor:
        solution = self.solver(kernel, values)
        self.heard = kernel, values, solution, self.solver
        return solution


def _overheard(
    attn: AttentionVariant, run: Callable[[AttentionVariant], object]
) -> tuple[AttentionVariant, tuple[Tensor, Tensor, Tensor, Solve] | None]:
    """A copy of the variant without its guard, and the kernel of a run of it, if it has one."""
    plain = copy.copy(attn)
    plain.guard = None
    solver = getattr(attn, "solver", None)
    if solver is None:
        return plain, None
    listening = copy.copy(plain)
    listener = _Listener(solver)
    listening.solver = listener  # type: ignore[attr-defined]
    run(listening)
    return plain, listener.heard
