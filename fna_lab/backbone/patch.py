"""Replace and mask the attention of any pretrained ViT, and take it back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context, Removal
from fna_lab.attn.layers import parse_layers
from fna_lab.attn.stopwatch import Stopwatch
from fna_lab.backbone.blocks import find_blocks, find_patch_embedding, says_cls, says_prefix
from fna_lab.backbone.seam import AttentionSeam, EnterSeam, LeaveSeam
from fna_lab.mask.base import Mask
from fna_lab.mask.detector.base import Evidence

Variant = TypeVar("Variant", AttentionVariant, Mask)

Observer = Callable[[Tensor, Tensor, Context], None]
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
    **settings: Any,
) -> Patch:
    """Replace the attention of some blocks of a ViT, and mask tokens out of it.

        with fna_lab.patch(model, attn="fna", layers=range(6, 12), num_landmarks=64):
            features = model(pictures)

    No weight, class or `forward` of the model is touched; `.remove()` or leaving the `with`
    restores it exactly. Patches nest: in a block that two of them claim, the later one acts.

    Args:
        model: a timm, open_clip or transformers ViT, or a model that contains one.
        attn: the variant, by name (a file of `fna_lab.attn`) or as an object.
        mask: the mask strategy, by name (a file of `fna_lab.mask`) or as an object.
        layers: blocks whose attention is replaced: `range(6, 12)`, `[6, 7]`, `"6-11"`, `0.5`
            (from half the depth on); None = from 13/24 of the depth on, as published for CLIP.
        blocks: dotted path of the host's list of blocks, where it is not found by itself.
        mask_layers: blocks whose attention is masked; None = the mask's own, else as `layers`.
        detect: block at which tokens are detected; None = the mask's own, else its first layer.
        **settings: of the variant, where `attn` is a name (`num_landmarks=64`).

    Returns:
        A handle, which is a context manager.

    Raises:
        ValueError: a name, layer or setting does not exist.
        TypeError: `attn` or `mask` is neither a name nor a variant.
        NotImplementedError: the variant cannot honour the mask.
    """
    attention = _resolve(attn, AttentionVariant, "fna_lab.attn", settings)
    strategy = _resolve(mask, Mask, "fna_lab.mask", {})
    path, found = find_blocks(model, blocks)
    depth = len(found)
    default = range(round(START * depth), depth)
    attn_layers = parse_layers(default if layers is None else layers, depth, setting="attn.layers")
    masked: tuple[int, ...] = ()
    if strategy.pattern is None:
        detect = None  # nobody would use what is found
    else:
        attention.check(strategy.pattern)
        wanted = strategy.layers if mask_layers is None else mask_layers
        masked = parse_layers(default if wanted is None else wanted, depth, setting="mask.layers")
        detect = strategy.detect if detect is None else detect
        detect = masked[0] if detect is None else detect
        parse_layers(detect, depth, setting="mask.detect")
        if detect > masked[0]:
            raise ValueError(
                f"mask.detect={detect}: tokens are detected after block {masked[0]}, the first "
                "one that masks them; expected that block or an earlier one."
            )
    return Patch(model, path, found, attention, strategy, attn_layers, masked, detect)


@dataclass
class Pass:
    """What one forward pass leaves for its later blocks."""

    last: int = -1
    nth: int = 0
    grid: tuple[int, int] | None = None
    tokens: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)


class Patch:
    """A patched model; see `patch`.

    Attributes:
        model: the host.
        blocks: its blocks, in order.
        attn: the attention variant and
        mask: the mask strategy at work.
        attn_layers: blocks whose attention is replaced.
        mask_layers: blocks whose attention is masked.
        detect: block at which tokens are detected, None without a mask.
        stopwatch: notes the time of attention and selection, None where nobody measures.
        observer: is shown queries, keys and context before each attention, None = nobody looks.
        meter: stands in for the attention of the replaced blocks and is given the variant, None =
            the variant itself attends.
        enabled: False while the model runs as it came.
        pictures: pictures seen by the detector so far.
        tokens: T of the last forward pass, bool `[b n]`, None before the first.
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
        detect: int | None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.attn = attn
        self.mask = mask
        self.attn_layers = attn_layers
        self.mask_layers = mask_layers
        self.detect = detect
        self.enabled = True
        self.stopwatch: Stopwatch | None = None
        self.observer: Observer | None = None
        self.meter: Meter | None = None
        self.pictures = 0
        self.tokens: Tensor | None = None
        self._found: list[Tensor] = []
        self._path = path
        self._exact = _resolve("exact", AttentionVariant, "fna_lab.attn", {})
        self._said_cls = says_cls(model)
        self._said_prefix = says_prefix(model)
        self._pass = Pass()
        self._input: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self._install()

    @property
    def _touched(self) -> set[int]:
        detect = () if self.detect is None else (self.detect,)
        return {*self.attn_layers, *self.mask_layers, *detect}

    @property
    def found(self) -> list[int]:
        """How many tokens were detected in each picture so far."""
        return [int(count) for counts in self._found for count in counts]

    def forget(self) -> None:
        """Forget the pictures and detections so far."""
        self.pictures, self._found, self.tokens = 0, [], None

    def remove(self) -> None:
        """Give the model back exactly as it came; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it came, inside the `with`."""
        # The hooks stay where they are: their order says which of several patches acts.
        was_enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was_enabled

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Detect tokens inside the `with`, and leave `pictures` and `found` as they were."""
        counts = self.pictures, list(self._found)
        try:
            yield
        finally:
            self.pictures, self._found = counts

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Show every block's attention to an observer, whether it is replaced or not."""
        others = tuple(i for i in range(len(self.blocks)) if i not in self._touched)
        none = _resolve("none", Mask, "fna_lab.mask", {})
        rest = Patch(self.model, self._path, self.blocks, self._exact, none, others, (), None)
        self.observer = rest.observer = observer
        try:
            yield
        finally:
            self.observer = None
            rest.remove()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _install(self) -> None:
        self._pass = Pass()
        embedding = find_patch_embedding(self.model, self._path)
        if embedding is not None:
            self._hooks.append(embedding.register_forward_hook(self._begin))
        for layer in sorted(self._touched):
            block = self.blocks[layer]
            seam = AttentionSeam(partial(self._attend, layer), f"{self._path}.{layer}")
            enter = EnterSeam(seam, partial(self._before, layer), self)
            self._hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            leave = LeaveSeam(enter)
            self._hooks.append(block.register_forward_hook(leave, always_call=True))

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG002
        rows, columns = output.shape[-2:]
        self._pass = Pass(grid=(rows, columns))

    def _before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer <= self._pass.last:  # a new pass through blocks that skipped the embedding
            self._pass = Pass(grid=self._pass.grid)
        self._pass.last = layer
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise NotImplementedError(
                f"Block {self._path}.{layer} receives {shape}; expected hidden states "
                "[batch tokens channels]. Windowed hosts are not supported."
            )
        self._input = x
        if layer == self.detect and self.mask.detector.reads == "hidden":
            prefix = self._prefix(x)
            self._keep(self.mask.detector(Evidence(x, prefix, self._has_cls(prefix))))

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
    ) -> Tensor:
        x = self._input
        assert x is not None
        if is_causal:
            raise NotImplementedError(
                f"Block {self._path}.{layer} attends causally; fna_lab replaces bidirectional "
                "attention only. Point blocks= at the vision tower."
            )
        if x.shape[1] != q.shape[2]:
            x = x.transpose(0, 1)  # hosts that keep tokens first: [n b c]
        if layer == self.detect and self.mask.detector.reads == "attention":
            self._keep(self._detect_from_cls(q, k, scale, x))
        variant = self._exact
        nth = self._pass.nth
        if layer in self.attn_layers:
            variant = self.attn
            self._pass.nth += 1
        prefix = self._prefix(x)
        context = Context(
            layer=layer,
            nth=nth,
            scale=scale,
            x=x,
            num_prefix_tokens=prefix,
            has_cls=self._has_cls(prefix),
            grid=self._pass.grid,
            attn_mask=attn_mask,
            removal=self._removal(layer),
            shared=self._pass.shared,
            stopwatch=self.stopwatch,
        )
        if self.observer is not None:
            self.observer(q, k, context)
        if self.meter is not None and variant is self.attn:
            return self.meter(variant, q, k, v, context)
        if self.stopwatch is None:
            return variant(q, k, v, context)
        begin = self.stopwatch.now()
        out = variant(q, k, v, context)
        self.stopwatch.note("attention", begin)
        return out

    def _detect_from_cls(self, q: Tensor, k: Tensor, scale: float, x: Tensor) -> Tensor:
        prefix = self._prefix(x)
        if not self._has_cls(prefix):
            raise NotImplementedError(
                f"mask/detector={self.mask.detector.name} reads the attention of CLS, and "
                f"{type(self.model).__name__} has no CLS; use mask/detector=norm_ratio."
            )
        return self.mask.detector(Evidence(x, prefix, True, q=q, k=k, scale=scale))

    def _keep(self, tokens: Tensor) -> None:
        prefix = self._prefix(tokens)
        counts = tokens.sum(1)
        rows = ops.token_rows(tokens)
        if not torch.compiler.is_compiling():
            full = (counts == tokens.shape[1] - prefix).nonzero()[:, 0].tolist()
            if full:
                raise ValueError(
                    f"mask.detector={self.mask.detector.name} ({self.mask.detector.threshold}) "
                    f"finds all {tokens.shape[1] - prefix} patch tokens of picture(s) {full} of "
                    f"the batch at block {self.detect}, so nothing would be left to attend to; "
                    "raise its threshold."
                )
        self.pictures += tokens.shape[0]
        self._found.append(counts.detach())
        self.tokens = self._pass.tokens = tokens
        self._pass.rows = rows

    def _removal(self, layer: int) -> Removal | None:
        if layer not in self.mask_layers:
            return None
        if self._pass.tokens is None or self._pass.rows is None:
            raise RuntimeError(
                f"mask.layers holds block {layer}, but no tokens were detected at block "
                f"{self.detect} in this forward pass; another patch may have taken that block."
            )
        rows, valid = self._pass.rows
        assert self.mask.pattern is not None
        return Removal(self._pass.tokens, self.mask.pattern, self.mask.stage, rows, valid)

    def _prefix(self, x: Tensor) -> int:
        """Tokens before the patch tokens, from the grid that the patch embedding made."""
        grid = self._pass.grid
        if grid is not None and 0 <= x.shape[1] - grid[0] * grid[1] < 64:
            return x.shape[1] - grid[0] * grid[1]
        return self._said_prefix

    def _has_cls(self, prefix: int) -> bool:
        return prefix > 0 if self._said_cls is None else self._said_cls


def named_attention(name: str, **settings: Any) -> AttentionVariant:
    """The variant of a file of `fna_lab.attn`, with these settings.

    Raises:
        ValueError: the name or a setting does not exist.
    """
    return _resolve(name, AttentionVariant, "fna_lab.attn", settings)


def _resolve(
    named: str | Variant, base: type[Variant], package: str, settings: dict[str, Any]
) -> Variant:
    """An object of a variant: itself, or the one class of the file that is named."""
    setting = package.rpartition(".")[2]
    if isinstance(named, base):
        if settings:
            raise ValueError(
                f"{', '.join(settings)}: settings go with a name; {setting} is an object already."
            )
        return named
    if not isinstance(named, str):
        raise TypeError(f"Expected {setting} to be a name or a {base.__name__}, got {named!r}.")
    module = f"{package}.{named}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"{setting}={named!r}: there is no {package}.{named}.") from None
    classes = [
        cls
        for _, cls in inspect.getmembers(found, inspect.isclass)
        if cls.__module__ == module and issubclass(cls, base)
    ]
    if len(classes) != 1 or named == "base":
        raise ValueError(f"{setting}={named!r} names no {base.__name__} of {package}.")
    try:
        inspect.signature(classes[0]).bind(**settings)
    except TypeError as error:
        known = ", ".join(inspect.signature(classes[0]).parameters) or "none"
        raise ValueError(f"{setting}={named!r}: {error}; its settings are: {known}.") from None
    return classes[0](**settings)
