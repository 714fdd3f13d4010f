"""Replace and mask the attention of any pretrained ViT, and take it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fna_lab.attn.base import AttentionVariant, Context, Removal
from fna_lab.attn.layers import parse_layers
from fna_lab.attn.stopwatch import Stopwatch
from fna_lab.backbone.adjust import Adjuster
from fna_lab.backbone.blocks import Layout, find_blocks, find_patch_embedding
from fna_lab.backbone.named import resolve
from fna_lab.backbone.neurons import NeuronTap
from fna_lab.backbone.passes import Again, Found, Pass, rows_of, runs_for_gradients
from fna_lab.backbone.plan import check_fit, plan_searches
from fna_lab.backbone.seam import AttentionSeam, Changed, EnterSeam, LeaveSeam, Probed, recompile
from fna_lab.backbone.search import Finder, Search
from fna_lab.hosts import hidden, text_of, tokens_first, with_hidden
from fna_lab.mask.base import Mask

Observer = Callable[[Tensor, Tensor, Tensor, Context], None]
Meter = Callable[[AttentionVariant, Tensor, Tensor, Tensor, Context], Tensor]

# CLIP ViT-L/14, 24 blocks: detection, masks and FNA from block 13 on; others in proportion.
START = 13 / 24


def patch(
    model: nn.Module,
    attn: str | AttentionVariant = "fna",
    mask: str | Mask = "none",
    *,
    layers: Any = None,
    blocks: str | None = None,
    mask_layers: Any = None,
    detect: int | None = None,
    restart: int | None = None,
    **settings: Any,
) -> Patch:
    """Replace the attention of some blocks of a ViT, and mask tokens out of it.

        with fna_lab.patch(model, attn="fna", layers=range(6, 12), num_landmarks=64):
            features = model(pictures)

    No weight, class or `forward` of the model is touched; `.remove()` or leaving the `with`
    restores it exactly. Patches nest: in a block that two of them claim, the later one acts.
    Graphs of `torch.compile` are forgotten when a patch comes or goes, and made anew; masks want
    `fullgraph=True`, and neither schedules of rounds nor a guard can be compiled. One thread at a
    time may run a patched model.

    Args:
        model: a timm, open_clip or transformers ViT, or a model that contains one.
        attn: the variant, by name (a file of `fna_lab.attn`) or as an object.
        mask: the mask strategy, by name (a file of `fna_lab.mask`) or as an object.
        layers: blocks whose attention is replaced: `range(6, 12)`, `[6, 7]`, `"6-11"`, `0.5`
            (from half the depth on); None = from 13/24 of the depth on, as published for CLIP.
        blocks: dotted path of the host's list of blocks, where it is not found by itself.
        mask_layers: blocks whose attention is masked; None = the mask's own, else as `layers`.
        detect: block at which tokens are detected, unless the mask names one; None = the first
            that it acts on.
        restart: first block that an iterative schedule runs again, unless the mask names one;
            None = at 9/24 of the depth.
        **settings: of the variant, where `attn` is a name (`num_landmarks=64`).

    Returns:
        A handle, which is a context manager.

    Raises:
        ValueError: a name, layer or setting does not exist.
        TypeError: `attn` or `mask` is neither a name nor a variant.
        NotImplementedError: the variant cannot honour the mask.
    """
    attention = resolve(attn, AttentionVariant, "fna_lab.attn", settings)
    strategy = resolve(mask, Mask, "fna_lab.mask", {})
    path, found = find_blocks(model, blocks)
    depth = len(found)
    default = range(round(START * depth), depth)
    attn_layers = parse_layers(default if layers is None else layers, depth, setting="attn.layers")
    attention.check_layers(attn_layers)
    masked: tuple[int, ...] = ()
    check_fit(attention, strategy, found[0])
    if strategy.acts:
        wanted = strategy.layers if mask_layers is None else mask_layers
        masked = parse_layers(default if wanted is None else wanted, depth, setting="mask.layers")
    searches = plan_searches(
        attention, strategy, attn_layers, masked, depth=depth, detect=detect, restart=restart
    )
    return Patch(model, path, found, attention, strategy, attn_layers, masked, searches)


class Patch:
    """A patched model; see `patch`.

    Attributes:
        model: the host.
        blocks: its blocks, in order.
        attn: the attention variant and
        mask: the mask strategy at work.
        attn_layers: blocks whose attention is replaced.
        mask_layers: blocks whose attention is masked.
        searches: how tokens are looked for: those of the mask, and the variant's token classes.
        stopwatch: notes the time of attention and selection, None where nobody measures.
        observer: is shown q, k, v and context before each attention, None = nobody looks.
        meter: stands in for the attention of the replaced blocks and is given the variant, None =
            the variant itself attends.
        enabled: False while the model runs as it came.
        running: the way into the seam of the block that is running, None between blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        blocks: list[nn.Module],
        attn: AttentionVariant,
        mask: Mask,
        attn_layers: tuple[int, ...],
        mask_layers: tuple[int, ...],
        searches: Sequence[Search],
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.attn = attn
        self.mask = mask
        self.attn_layers = attn_layers
        self.mask_layers = mask_layers
        self.searches = tuple(searches)
        self.enabled = True
        self.running: EnterSeam | None = None
        self.stopwatch: Stopwatch | None = None
        self.observer: Observer | None = None
        self.meter: Meter | None = None
        self._path = path
        self._exact = resolve("exact", AttentionVariant, "fna_lab.attn", {})
        self._layout = Layout(model, path)
        self._turn = tokens_first(blocks[0])
        self._finder = Finder(blocks, self._seam, self._prefix, self._layout.has_cls)
        self._pass = Pass()
        self._resumed = False
        self._adjuster = Adjuster(mask, blocks, mask_layers)
        self._hooks: list[RemovableHandle] = []
        self._install()

    @property
    def _touched(self) -> set[int]:
        read = {layer for search in self.searches for layer in search.reruns}
        return {*self.attn_layers, *self.mask_layers, *self._adjuster.span, *read}

    @property
    def detect(self) -> int | None:
        """Block at which the mask's tokens are detected, None without a mask."""
        return next((s.detect for s in self.searches if s.name == "mask"), None)

    @property
    def tokens(self) -> Tensor | None:
        """T of the last forward pass, bool `[b n]`; None before the first."""
        return getattr(self._pass.found.get("mask"), "tokens", None)

    @property
    def ranks(self) -> Tensor | None:
        """The round in which each token of T was found, 0 = none, long `[b n]`."""
        return getattr(self._pass.found.get("mask"), "ranks", None)

    @property
    def strengths(self) -> Tensor | None:
        """Of an iterative schedule, how far each token of T stood out when it was found."""
        return getattr(self._pass.found.get("mask"), "scores", None)

    @property
    def classes(self) -> dict[str, Tensor]:
        """Token classes of the last forward pass, bool `[b n]` each."""
        return {s.name: self._class(s.name) for s in self.searches if s.name != "mask"}

    @property
    def found(self) -> list[int]:
        """How many tokens of T were detected in each picture so far."""
        return self._finder.counted(0)

    @property
    def rounds(self) -> list[int]:
        """In how many rounds, in each picture so far."""
        return self._finder.counted(1)

    @property
    def arisen(self) -> list[int]:
        """How many tokens of T were found only once others were taken out, in each picture."""
        return self._finder.counted(2)

    @property
    def pictures(self) -> int:
        """Pictures seen by the mask's detector so far."""
        return len(self.found)

    def forget(self) -> None:
        """Forget the pictures and detections so far."""
        self._finder.counts = []
        self._pass = Pass()

    def remove(self) -> None:
        """Give the model back exactly as it came; a second call does nothing."""
        if self.running is not None:
            self.running.leave()
        if self._hooks:
            recompile()
        while self._hooks:
            self._hooks.pop().remove()
        self._pass = Pass(found=self._pass.found)  # nothing of the last pictures but their tokens

    def left(self) -> None:
        """A block is done, and what it worked on is not needed any more."""
        self.running = self._pass.input = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it came, inside the `with`."""
        # The hooks stay where they are: their order says which of several patches acts.
        was_enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was_enabled

    def uncounted(self) -> AbstractContextManager[None]:
        """Detect tokens inside the `with`, and leave `pictures` and `found` as they were."""
        return self._finder.uncounted()

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Show every block's attention to an observer, whether it is replaced or not."""
        own = len(self._hooks)
        for layer in {*range(len(self.blocks))} - self._touched:
            self._take(layer)
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None
            while len(self._hooks) > own:
                self._hooks.pop().remove()

    def __enter__(self) -> Patch:
        if not self._hooks:
            raise RuntimeError("This patch was removed; call fna_lab.patch again.")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _install(self) -> None:
        for search in self.searches:
            search.prepared = search.detector.prepare(self.blocks, search.detect)
            search.neurons = NeuronTap(self.blocks, search.detector.neurons)
            self._hooks += search.neurons.handles
        embedding = find_patch_embedding(self.model, self._path)
        if embedding is not None:
            self._hooks.append(embedding.register_forward_hook(self._begin))
        asked: dict[str, Any] = {"enabled": lambda: self.enabled, "kept": lambda: self._pass.kept}
        asked["prefix"] = partial(self._prefix, layer=self.attn_layers[0])
        self._hooks += self.attn.hooks(self.blocks, self.attn_layers, **asked)
        self._hooks += self._adjuster.hooks(lambda: self._pass if self.enabled else None)
        for layer in sorted(self._touched):
            self._take(layer)
        recompile()

    def _take(self, layer: int) -> None:
        block = self.blocks[layer]
        enter = EnterSeam(self._seam(layer), partial(self._before, layer), self)
        self._hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(block.register_forward_hook(LeaveSeam(enter), always_call=True))

    def _seam(self, layer: int, again: Again | None = None) -> AttentionSeam:
        attend = partial(self._attend, layer, again=again)
        after = self._adjuster.after if self.mask.corrects else None
        return AttentionSeam(attend, f"{self._path}.{layer}", after)

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG002
        rows, columns = output.shape[-2:]
        self._pass = Pass(grid=(rows, columns))

    def _before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Look at a block's input, and change it where a strategy wants so."""
        x = hidden(args, kwargs, f"{self._path}.{layer}", turn=self._turn)
        self._resumed = runs_for_gradients() and layer in self._pass.begun
        if self._resumed:
            self._pass.resume(layer, x, self._path)
        else:
            if layer <= self._pass.last:  # a new pass through blocks that skipped the embedding
                self._pass = Pass(grid=self._pass.grid)
            self._pass.begin(layer, x)
        x = given = self._pass.join(x, text_of(self.blocks[layer], args, kwargs))
        self._pass.read_padding(args, kwargs, x, self._extra(layer))
        for search in self.searches:
            if search.probes and layer in search.reruns:
                self._pass.calls[layer] = args, kwargs
            if layer == search.detect and (search.probes or search.reads_hidden):
                if not self._resumed:
                    self._finder.look(search, self._pass, x)
                before = [i for i in self.mask_layers if i < layer]
                if search.name == "mask" and before:
                    x = self._finder.masked(search, self._pass, before)
        if self.mask.rewrites and layer == self.mask_layers[0]:
            tokens, prefix = self._known("mask").tokens, self._prefix(x, layer)
            x = self._adjuster.rewrite(x, tokens, self._pass, prefix, self._extra(layer))
        self._pass.input = x
        return None if x is given else with_hidden(args, kwargs, x, turn=self._turn)

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_mask: Tensor | None,
        scale: float,
        is_causal: bool,
        again: Again | None = None,
    ) -> Tensor:
        x = self._pass.input if again is None else again.x
        stays = again.stays if again else not any(layer in s.redone for s in self.searches)
        assert x is not None
        if is_causal:
            raise NotImplementedError(
                f"Block {self._path}.{layer} attends causally; fna_lab replaces bidirectional "
                "attention only. Point blocks= at the vision tower."
            )
        if again is not None and again.probe:
            raise Probed(q, k, attn_mask, scale)
        if again is None and self._resumed:
            stays = False
        elif again is None:
            for search in self.searches:
                if layer == search.detect and not search.probes and not search.reads_hidden:
                    self._finder.look(search, self._pass, x, (q, k, attn_mask, scale))
        variant, nth = self._exact, self._pass.nth
        if layer in self.attn_layers:
            variant, self._pass.nth = self.attn, nth + 1
        prefix = self._prefix(x, layer)
        context = Context(
            layer=layer,
            depth=len(self.blocks),
            nth=nth,
            scale=scale,
            x=x,
            num_prefix_tokens=prefix,
            num_extra_tokens=self._extra(layer),
            num_suffix_tokens=self._pass.suffix,
            has_cls=self._layout.has_cls(prefix),
            grid=self._pass.fitting(x.shape[1] - prefix - self._extra(layer) - self._pass.suffix),
            attn_mask=self._adjuster.keys(attn_mask, x, layer, self._pass),
            removal=self._removal(layer) if again is None else again.removal,
            shared=self._pass.shared,
            stopwatch=self.stopwatch if again is None else None,
            classes={
                c: rows_of(self._class(c), again and again.only) for c in variant.token_classes
            },
            stays=stays,
            masks=self._pass.masks,
        )
        if again is None and layer in self.mask_layers and self._adjuster.works:
            found = self._known("mask").tokens if self.mask.looks else None
            self._adjuster.before(context, q, k, v, found)
        if self.observer is not None and stays:
            self.observer(q, k, v, context)
        if self.meter is not None and stays and variant is self.attn:
            return self.meter(variant, q, k, v, context)
        with context.timed("attention"):
            return variant(q, k, v, context)

    def _removal(self, layer: int) -> Removal | None:
        if layer not in self.mask_layers or self.mask.pattern is None:
            return None
        search = next(s for s in self.searches if s.name == "mask")
        if layer < search.detect:
            return None  # this block runs again, masked, once the tokens are known
        return search.removal(self._known("mask"))

    def _known(self, name: str) -> Found:
        return self._pass.known(name, self._path)

    def _class(self, name: str) -> Tensor:
        tokens = self._known(name).tokens
        # Iterative detection at the sinks' threshold finds the massive tokens first.
        return tokens & ~self._known("massive").tokens if name == "artifact" else tokens

    def _extra(self, layer: int) -> int:
        """Tokens that are appended behind the host's own in a block."""
        mine = self.attn.num_extra_tokens if layer >= self.attn_layers[0] else 0
        return mine + self._adjuster.extra(layer, self._pass)

    def _prefix(self, x: Tensor, layer: int) -> int:
        """Tokens before the patch tokens, from the grid that the patch embedding made."""
        own = x.shape[1] - self._extra(layer) - self._pass.suffix
        return self._layout.prefix_of(own, self._pass.grid)
