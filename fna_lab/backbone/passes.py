"""What one forward pass leaves for its later blocks, and for blocks that run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Removal
from fna_lab.attn.host_mask import HostMasks
from fna_lab.hosts import kept_of


@dataclass
class Found:
    """What a search found in one batch.

    Attributes:
        tokens: the set, bool `[b n]`.
        ranks: the round in which each token was found, from 1; 0 = not found; long `[b n]`.
        scores: of an iterative search, how far each token stood out when it was found, else 0.
        first: what the detector found before anything was taken out, bool `[b n]`.
        rows: `ops.token_rows(tokens)`, once somebody asks for it.
    """

    tokens: Tensor
    ranks: Tensor
    scores: Tensor
    first: Tensor
    rows: tuple[Tensor, Tensor] | None = None

    def of(self, pictures: Tensor) -> Found:
        """The same of some pictures of the batch, long `[p]`."""
        ranks, scores = self.ranks[pictures], self.scores[pictures]
        return Found(self.tokens[pictures], ranks, scores, self.first[pictures])


@dataclass
class Pass:
    """What one forward pass leaves for its later blocks.

    Attributes:
        last: the block that ran last.
        nth: how many blocks with the attention variant ran.
        grid: (rows, columns) of the patch tokens.
        suffix: text tokens behind them, in joint blocks.
        kept: tokens that are no padding, bool `[b n]`; None = all.
        appended: which tokens that a mask appended are no padding, bool `[b t]`; None before.
        ran: blocks that attended to them so far.
        found: by the name of the search.
        shared: by attention variants.
        calls: positional and keyword arguments of the blocks that may run again.
        begun: `nth` and `shared` as they were when a block began, and where its input lay.
        masks: what was read of the host's masks, None before the first block.
        input: what the running block works on `[b n c]`; None between blocks.
    """

    last: int = -1
    nth: int = 0
    grid: tuple[int, int] | None = None
    suffix: int = 0
    kept: Tensor | None = None
    appended: Tensor | None = None
    ran: int = 0
    found: dict[str, Found] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    begun: dict[int, tuple[int, dict[str, Any], int]] = field(default_factory=dict)
    masks: HostMasks | None = None
    input: Tensor | None = None

    def __reduce__(self) -> tuple[type[Pass], tuple[()]]:
        """Copies and pickles of a model hold nothing of a pass: it has graphs, and ends."""
        return Pass, ()

    def begin(self, layer: int, x: Tensor) -> None:
        """Note that a block begins, on its input `[b n c]`."""
        self.last, self.masks = layer, self.masks or HostMasks()
        self.begun[layer] = self.nth, dict(self.shared), _place(x)

    def resume(self, layer: int, x: Tensor, blocks: str) -> None:
        """Put things back as they were when a block began, which runs again for its gradients.

        Raises:
            RuntimeError: it belongs to another pass, whose landmarks or tokens are forgotten.
        """
        self.nth, shared, place = self.begun[layer]
        self.shared = dict(shared)
        if (shared or self.found) and place != _place(x):
            raise RuntimeError(
                f"Block {blocks}.{layer} runs again for its gradients (activation checkpointing), "
                "but the model has seen other pictures since; expected backward() before the next "
                "forward pass, for landmarks and found tokens of one pass alone are kept."
            )

    def read_padding(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, extra: int
    ) -> None:
        """Note which tokens are no padding, by a block's arguments; `extra` are appended."""
        read = self.masks or HostMasks()
        self.kept = ops.kept_before(kept_of(args, kwargs, read.kept), x, extra)

    def known(self, name: str, blocks: str) -> Found:
        """What the search of a name found.

        Raises:
            RuntimeError: it did not run in this pass; says which block needs it.
        """
        if name not in self.found:
            raise RuntimeError(
                f"Block {blocks}.{self.last} needs the tokens of {name!r}, but none were looked "
                "for in this forward pass; another patch may have taken the detection block."
            )
        return self.found[name]

    def fitting(self, patches: int) -> tuple[int, int] | None:
        """The grid of so many patch tokens; None where there are others than the host cut."""
        return self.grid if self.grid and self.grid[0] * self.grid[1] == patches else None

    def join(self, x: Tensor, text: Tensor | None) -> Tensor:
        """What a block attends over: `[b n c]`, with the text `[b t c]` of a joint one behind."""
        self.suffix = 0 if text is None else text.shape[1]
        return x if text is None else torch.cat([x, text], dim=1)


@dataclass(frozen=True)
class Again:
    """What a block does when it runs again.

    Attributes:
        x: its input `[b n c]`.
        removal: what is taken out of its attention.
        probe: stop at its attention, and tell queries and keys.
        stays: whether the pass goes on with its output.
        only: pictures of the batch that `x` holds, long `[p]`; None = all.
    """

    x: Tensor
    removal: Removal | None = None
    probe: bool = False
    stays: bool = False
    only: Tensor | None = None


def runs_for_gradients() -> bool:
    """Whether a backward pass is at work: activation checkpointing then runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def rows_of(x: Any, pictures: Tensor | None) -> Any:
    """Rows of some pictures, of what has such rows: a tensor, or a named tuple of tensors."""
    if hasattr(x, "_fields"):
        return type(x)(*(rows_of(part, pictures) for part in x))
    return x if pictures is None or not isinstance(x, Tensor) else x[pictures]


def _place(x: Tensor) -> int:
    """Where a tensor lies; a graph that is compiled does not know, and never runs again."""
    return 0 if torch.compiler.is_compiling() else x.data_ptr()
