"""How a set of tokens is looked for inside a forward pass: at once, or round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fna_lab import ops
from fna_lab.attn.base import Removal
from fna_lab.backbone.neurons import NeuronTap
from fna_lab.backbone.passes import Again, Found, Pass, rows_of
from fna_lab.backbone.seam import AttentionSeam, Call, Probed
from fna_lab.hosts import given, hidden, tokens_first, with_hidden
from fna_lab.mask.detector.base import Detector, Evidence


@dataclass
class Search:
    """One set of tokens and how it is looked for.

    Attributes:
        name: what the set is called: `mask`, or a token class.
        detector: finds the tokens.
        detect: block that the detector reads.
        restart: first block that runs again between rounds.
        rounds: most rounds; 1 = one-shot.
        per_round: most tokens that a round adds; None = all over the threshold, as one-shot.
        pattern: pairs that are taken away while blocks run again.
        stage: before or after softmax.
        early: whether the set must be known before the detection block runs.
        redone: blocks before it that run once more, masked, when the set is known.
        prepared: what the detector's `prepare` returned.
        neurons: reads the neurons that the detector lists.
    """

    name: str
    detector: Detector
    detect: int
    restart: int
    rounds: int = 1
    per_round: int | None = None
    pattern: str = "type1"
    stage: str = "mask"
    early: bool = False
    redone: range = range(0)
    prepared: Any = None
    neurons: NeuronTap | None = None

    @property
    def iterative(self) -> bool:
        """Whether blocks run again."""
        return self.rounds > 1

    @property
    def reads_hidden(self) -> bool:
        """Whether hidden states are all that the detector needs."""
        return self.detector.reads == "hidden"

    @property
    def reruns(self) -> range:
        """Blocks that run again, the detection block among them."""
        return range(self.restart if self.iterative else self.detect, self.detect + 1)

    @property
    def probes(self) -> bool:
        """Whether the detection block is looked into before it runs."""
        return self.iterative or self.early

    def removal(self, found: Found) -> Removal:
        """What is taken away of attention once these tokens are found."""
        if found.rows is None:
            found.rows = ops.token_rows(found.tokens)
        return Removal(found.tokens, self.pattern, self.stage, *found.rows)


class Finder:
    """Looks for tokens, and runs blocks again for it.

    Args:
        blocks: the host's blocks.
        seam: the seam of a block that runs again.
        prefix: hidden states and block -> number of prefix tokens.
        has_cls: number of prefix tokens -> whether token 0 is CLS.

    Attributes:
        counts: of every batch so far, by picture: tokens of T, rounds, and those of T that were
            none before others were taken out; long `[b]` each.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        seam: Callable[[int, Again], AttentionSeam],
        prefix: Callable[[Tensor, int], int],
        has_cls: Callable[[int], bool],
    ) -> None:
        self.blocks = blocks
        self.seam = seam
        self.prefix = prefix
        self.has_cls = has_cls
        self.turn = tokens_first(blocks[0])
        self.counts: list[tuple[Tensor, Tensor, Tensor]] = []

    def counted(self, which: int) -> list[int]:
        """One of the `counts` of every picture so far."""
        return [int(count) for counts in self.counts for count in counts[which]]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave the `counts` as they were."""
        counts = list(self.counts)
        try:
            yield
        finally:
            self.counts = counts

    @torch.no_grad()  # nor must a block that runs again for its gradients look again
    def look(self, search: Search, state: Pass, x: Tensor, call: Call | None = None) -> None:
        """Rounds of detection until nothing new is found; what is found goes to the pass.

        Each picture's set depends on itself alone: one that is done finds nothing new in the
        rounds that its batch mates still need.

        Args:
            search: how.
            state: the pass.
            x: input of the detection block `[b n c]`.
            call: its queries, keys, mask and scale, where it is running.

        Raises:
            ValueError: nothing would be left to attend to.
        """
        shown = self._evidence(search, state, x, None, call)
        first = search.detector(shown)
        new, scores = _strongest(search, shown, first)
        found = Found(new, new.long(), scores, first)
        for number in range(2, search.rounds + 1):
            still = new.any(1).nonzero()[:, 0]  # pictures that may find more
            if len(still) == 0:
                break
            part = found.of(still)
            removals = dict.fromkeys(search.reruns, search.removal(part))
            again = self._rerun(search, state, removals, only=still)
            shown = self._evidence(search, state, again, part, only=still)
            more, scores = _strongest(search, shown, search.detector(shown) & ~part.tokens)
            new = torch.zeros_like(new).index_copy(0, still, more)
            found = Found(
                found.tokens | new,
                found.ranks + number * new,
                found.scores.index_add(0, still, scores),
                first,
            )
        state.found[search.name] = found
        if search.name == "mask":
            self._check(search, x, found.tokens, state.kept)
            search.removal(found)  # finds the rows of T once, outside of any timed attention
            new = (found.tokens & ~first).sum(1)
            self.counts.append((found.tokens.sum(1), found.ranks.amax(1), new))

    def masked(self, search: Search, state: Pass, layers: Sequence[int]) -> Tensor:
        """The detection block's input `[b n c]` once these blocks before it are masked."""
        removal = search.removal(state.found[search.name])
        return self._rerun(search, state, dict.fromkeys(layers, removal), stay=True)

    def _evidence(
        self,
        search: Search,
        state: Pass,
        x: Tensor,
        found: Found | None,
        call: Call | None = None,
        only: Tensor | None = None,
    ) -> Evidence:
        if call is None and not search.reads_hidden:
            try:
                self._run(search.detect, state, Again(x, probe=True, only=only))
            except Probed as seen:
                call = seen.call
        q, k, attn_mask, scale = call or (None, None, None, 1.0)
        prefix = self.prefix(x, search.detect)
        kept = state.kept
        if kept is not None:
            kept = (kept if len(kept) == 1 else rows_of(kept, only)).expand(x.shape[:2])
        return Evidence(
            x,
            prefix,
            self.has_cls(prefix),
            grid=state.grid,
            q=q,
            k=k,
            scale=scale,
            bias=attn_mask,
            found=None if found is None else found.tokens,
            stage=search.stage,
            kept=kept,
            neurons=search.neurons and search.neurons.read(only, again=search.restart),
            prepared=search.prepared,
        )

    def _rerun(
        self,
        search: Search,
        state: Pass,
        removals: dict[int, Removal],
        *,
        only: Tensor | None = None,
        stay: bool = False,
    ) -> Tensor:
        """Run the blocks before detection again; returns the input of the detection block.

        `only` names pictures of the batch. Later blocks see what these leave for them if they are
        to `stay`.
        """
        here = state.nth, state.shared
        self._expect(search.restart, state)
        state.nth, shared, _ = state.begun[search.restart]
        x = self._hidden(search.restart, state)
        state.shared = {key: rows_of(value, only) for key, value in shared.items()}
        x = rows_of(x, only)
        for layer in range(search.restart, search.detect):
            x = self._run(layer, state, Again(x, removals.get(layer), stays=stay, only=only))
        if not stay:
            state.nth, state.shared = here
        return x

    def _run(self, layer: int, state: Pass, again: Again) -> Tensor:
        self._expect(layer, state)
        args, kwargs = state.calls[layer]
        batch = self._hidden(layer, state).shape[0]
        only = again.only
        if only is not None:
            # Of the other arguments, masks alone know the pictures: [b h|1 n|1 n].
            args, kwargs = tree_map(lambda part: _of_mask(part, only, batch), (args, kwargs))
        args, kwargs = with_hidden(args, kwargs, again.x, turn=self.turn)
        with self.seam(layer, again):  # forward, not the call: hooks belong to the main pass
            out = self.blocks[layer].forward(*args, **kwargs)
        return given(out, turn=self.turn)

    def _hidden(self, layer: int, state: Pass) -> Tensor:
        return hidden(*state.calls[layer], f"{layer}", turn=self.turn)

    def _expect(self, layer: int, state: Pass) -> None:
        if layer not in state.calls:
            raise RuntimeError(
                f"Block {layer} must run again to look for tokens, but it was not seen in this "
                "forward pass; another patch may have taken it."
            )

    def _check(self, search: Search, x: Tensor, tokens: Tensor, kept: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            return
        candidates = ops.num_kept(kept, tokens.shape[1]) - self.prefix(x, search.detect)
        counts = tokens.sum(1, keepdim=True)
        full = (counts == candidates).nonzero()[:, 0].tolist()
        if full:
            raise ValueError(
                f"mask.detector={search.detector.name} ({search.detector.threshold}) finds "
                f"all {int(counts[full[0]])} patch tokens of picture(s) {full} of the batch at "
                f"block {search.detect}, so nothing would be left to attend to; raise its "
                "threshold."
            )


def _strongest(search: Search, shown: Evidence, new: Tensor) -> tuple[Tensor, Tensor]:
    """The new tokens that a round may add, and how far they stand out."""
    if not search.iterative and search.per_round is None:
        return new, torch.zeros_like(new, dtype=torch.float32)
    scores = search.detector.scores(shown).float()
    if search.per_round is not None:
        # Stable: of equal scores the token with the lower index comes first.
        ranked = scores.masked_fill(~new, -torch.inf).sort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(new).scatter(1, ranked.indices[:, : search.per_round], True)
        new = new & best
    return new, scores.masked_fill(~new, 0)


def _of_mask(part: Any, pictures: Tensor, batch: int) -> Any:
    is_mask = isinstance(part, Tensor) and part.ndim == 4 and part.shape[0] == batch
    return part[pictures] if is_mask else part
