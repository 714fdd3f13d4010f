"""What every finding is: a claim, a measurement on pictures, and a verdict with its numbers."""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.backbone.base import Backbone, Features
from fna_lab.backbone.patch import Observer, patch
from fna_lab.mask.base import Mask
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.iterative_sinking import IterativeSinkingMask
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask


@dataclass(frozen=True)
class Verdict:
    """What a finding comes to on one backbone.

    Attributes:
        holds: None = these pictures and this backbone cannot tell.
        says: why, in one sentence with numbers.
        numbers: what the verdict rests on, by name.
    """

    holds: bool | None
    says: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """How a finding's numbers are drawn.

    Attributes:
        kind: `points` (one dot a picture and the mean with its interval, a column a name),
            `series` (means over pictures round by round) or `grid` (the 27 landmark settings).
        columns: names of the numbers, as `measure` gives them, with the words to show.
        unit: of the vertical axis.
        level: where a line marks what would be no effect; None = none.
        log: whether the axis is logarithmic.
    """

    kind: str
    columns: Mapping[str, str]
    unit: str
    level: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        hidden: what each block gave, `[b n c]`.
        features: after the last of them.
        tokens: what a mask found, bool `[b n]`; None without one.
        ranks: the rounds in which it found them, long `[b n]`.
        strengths: how far each stood out then, `[b n]`.
    """

    hidden: list[Tensor]
    features: Features
    tokens: Tensor | None
    ranks: Tensor | None
    strengths: Tensor | None


class Given(Detector):
    """Tokens that are known before.

    Args:
        tokens: bool `[b n]`.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, evidence: Evidence) -> Tensor:
        """The given tokens."""
        return self.tokens & evidence.candidates()

    def scores(self, evidence: Evidence) -> Tensor:
        """All alike."""
        return torch.zeros_like(self.tokens, dtype=evidence.x.dtype)


class FewDetector(ClsProxyDetector):
    """The CLS proxy, but no token of a picture where it would find more than half of the patches.

    A CLS that attends evenly, as in random weights, exceeds 0.3 of its own weight everywhere;
    extreme tokens are few.
    """

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        found = super().__call__(evidence)
        patches = evidence.candidates().sum(1, keepdim=True)
        return found & (2 * found.sum(1, keepdim=True) <= patches)


class Lab:
    """A batch of pictures and a backbone, run under attention variants and masks.

    What several findings need is run once.

    Args:
        backbone: the model.
        images: normalised pictures `[b 3 h w]`.
        labels: classes `[b]`, None without.
        texts: unit class embeddings `[classes e]` for zero-shot guesses, None without.
        rounds: most rounds of iterative schedules.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        texts: Tensor | None = None,
        rounds: int = 24,
    ) -> None:
        self.backbone = backbone
        self.images = images
        self.labels = labels
        self.texts = texts
        self.rounds = rounds
        self._traces: dict[object, Trace] = {}

    @property
    def deep(self) -> range:
        """Blocks from the restart block on."""
        return range(self.backbone.anatomy.restart, self.backbone.depth)

    def plain(self) -> Trace:
        """The model as it is."""
        return self._once("plain", lambda: self.run())

    def massive(self) -> Tensor:
        """Massive tokens of the published one-round setting, bool `[b n]`."""
        tokens = self.oneshot("type1", "sink").tokens
        assert tokens is not None
        return tokens

    def massive_facts(self) -> dict[str, Tensor]:
        """How many there are, and their mean norm in medians before the mask block, `[b]` each."""
        chosen = self.of_patches(self.massive())
        before = self.plain().hidden[max(self.backbone.anatomy.detect - 1, 0)]
        norms = self.norms(before)
        norms = norms / norms.median(1, keepdim=True).values
        return {"massive": chosen.sum(1), "norm": (norms * chosen).sum(1) / chosen.sum(1)}

    def oneshot(self, pattern: str, stage: str) -> Trace:
        """Massive tokens taken out at once, from the anatomy's mask block on."""
        kinds = {"type1": Type1Mask, "type2": Type2Mask}
        mask = kinds[pattern](stage=stage, detector=FewDetector(ratio=0.3))
        return self._once((pattern, stage), lambda: self.run(mask=mask))

    def sinks(self) -> Tensor:
        """Tokens that iterative masking takes out, massive ones first, bool `[b n]`."""
        tokens = self.iterative("mask").tokens
        assert tokens is not None
        return tokens

    def without(self, tokens: Tensor, pattern: str, stage: str) -> Trace:
        """Given tokens taken out of attention from the restart block on."""
        kinds = {"type1": Type1Mask, "type2": Type2Mask}
        mask = kinds[pattern](stage=stage, detector=Given(tokens), detect=self.deep[0])
        return self.run(mask=mask, layers=self.deep)

    def strongest(self, tokens: Tensor, stage: str) -> Tensor:
        """The strongest sink beside given ones that are taken out: a[CLS, t] / a[CLS, CLS] `[b]`.

        Without CLS, the largest incoming attention in uniform shares.
        """
        seen: list[Tensor] = []

        def observe(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:  # noqa: ARG001
            if context.layer == self.backbone.anatomy.detect:
                shown = Evidence(
                    context.x, context.num_prefix_tokens, context.has_cls,
                    q=q, k=k, scale=context.scale, found=tokens, stage=stage,
                )  # fmt: skip
                seen.append(ClsProxyDetector(ratio=1.0).scores(shown).amax(1))

        mask = Type1Mask(stage=stage, detector=Given(tokens), detect=self.deep[0])
        self.run(mask=mask, layers=self.deep, observer=observe)
        return seen[0]

    def iterative(self, stage: str, pattern: str = "type1") -> Trace:
        """Sinks taken out one a round, from the restart block on."""
        kinds = {"mask": IterativeMaskingMask, "sink": IterativeSinkingMask}
        mask = kinds[stage](pattern=pattern, max_rounds=self.rounds)
        key = ("iterative", stage, pattern)
        return self._once(key, lambda: self.run(mask=mask, layers=self.deep))

    def _once(self, key: object, run: Callable[[], Trace]) -> Trace:
        if key not in self._traces:
            self._traces[key] = run()
        return self._traces[key]

    @torch.no_grad()
    def run(
        self,
        attn: str | AttentionVariant = "exact",
        mask: str | Mask = "none",
        *,
        layers: Sequence[int] | None = None,
        observer: Observer | None = None,
        **settings: Any,
    ) -> Trace:
        """One forward pass.

        Args:
            attn: the variant.
            mask: the strategy.
            layers: blocks that both act on; None = from the anatomy's mask block on.
            observer: is shown the attention of those blocks.
            **settings: of the variant, where it is a name.
        """
        anatomy, depth = self.backbone.anatomy, self.backbone.depth
        layers = range(anatomy.mask, depth) if layers is None else layers
        hidden: list[Tensor] = []

        def keep(block: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            hidden.append(output[0] if isinstance(output, tuple) else output)

        hooks = []
        handle = patch(
            self.backbone.host,
            attn,
            mask,
            layers=layers,
            mask_layers=layers,
            blocks=self.backbone.blocks_path,
            detect=anatomy.detect,
            restart=anatomy.restart,
            **settings,
        )
        handle.observer = observer
        try:
            hooks = [b.register_forward_hook(keep) for b in self.backbone.blocks]
            features = self.backbone(self.images)
            return Trace(hidden, features, handle.tokens, handle.ranks, handle.strengths)
        finally:
            for hook in hooks:
                hook.remove()
            handle.remove()

    def norms(self, x: Tensor) -> Tensor:
        """Norms of the patch tokens, in at least float32: `[b n c]` -> `[b p]`."""
        return ops.patch_norms(x, self.backbone.num_prefix_tokens)

    def of_patches(self, tokens: Tensor) -> Tensor:
        """The part of a token set that patch tokens are: `[b n]` -> `[b p]`."""
        return tokens[:, self.backbone.num_prefix_tokens :]

    def correct(self, features: Features) -> Tensor | None:
        """Whether the zero-shot class is right, 0 or 1 `[b]`; None without texts or labels."""
        if self.texts is None or self.labels is None:
            return None
        unit = F.normalize(features.pooled.float(), dim=-1)
        return ((unit @ self.texts.mT).argmax(1) == self.labels).double()


class Finding(ABC):
    """One published claim.

    Attributes:
        number: its place in the list.
        claim: what was published, in one sentence.
        source: where.
        plot: how it is drawn.
    """

    number: int
    claim: str
    source: str
    plot: Plot

    @abstractmethod
    def measure(self, lab: Lab) -> dict[str, Tensor]:
        """Numbers of each picture, `[b]` or `[b r]`; NaN where a picture cannot tell."""

    @abstractmethod
    def verdict(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """What the numbers of all pictures, `[n]` or `[n r]`, come to."""

    @property
    def name(self) -> str:
        """The finding's name: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]


# A log ratio below it, which is 5 %, is called small beside growth by factors.
SMALL = 0.05


@dataclass(frozen=True)
class Mean:
    """A mean over the pictures that can tell, with its bootstrap interval (95 %).

    Attributes:
        value: the mean.
        low: lower end.
        high: upper end.
        count: pictures that it is of.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Mean | None:
        """The mean of the values that are finite; None where none is."""
        known = values.double()[values.isfinite()]
        if len(known) == 0:
            return None
        return cls(known.mean().item(), *ops.bootstrap_mean(known), len(known))

    def said(self, form: str = ".3g") -> str:
        """Mean and interval as text."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def change(self) -> str:
        """A mean log ratio in words: `12 % smaller [10, 14 %]`, or a factor where it is large."""
        ends = self.value, self.low, self.high
        if max(abs(end) for end in ends) > math.log(2):
            value, low, high = (math.exp(end) for end in ends)
            return f"{value:.3g} times as large [{low:.3g}, {high:.3g}]"
        value, *limits = (100 * math.expm1(end) for end in ends)
        word = "smaller" if value < 0 else "larger"
        low, high = sorted(-limit if value < 0 else limit for limit in limits)
        return f"{abs(value):.2g} % {word} [{low:.2g}, {high:.2g} %]"

    def numbers(self, name: str) -> dict[str, float]:
        """Value, ends and count by name."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high,
                f"{name}_n": float(self.count)}  # fmt: skip


def only(values: Tensor, where: Tensor) -> Tensor:
    """Values of the pictures that can tell, NaN elsewhere: `[b]`, bool `[b]` -> `[b]`."""
    return values.double().masked_fill(~where, torch.nan)


def compared(
    mean: Mean | None, level: float, says: str, name: str, *, above: bool, small: float = 0.0
) -> Verdict:
    """The verdict on a mean that is claimed to lie above (or below) a level, interval and all.

    Args:
        mean: None = no picture can tell.
        level: what would be no effect.
        says: a sentence with `{mean}` or `{change}` (of a log ratio, in words), and `{n}`.
        name: of the number.
        above: which side is claimed.
        small: a smaller difference from the level is called so, however sure it is.
    """
    if mean is None:
        return Verdict(None, "no picture here has such tokens, so nothing can be taken away")
    up, down = mean.low > level, mean.high < level
    holds = None if not (up or down) else up == above
    text = says.format(mean=mean.said(), change=mean.change(), n=mean.count)
    if holds is None:
        text += "; the interval includes no effect"
    elif abs(mean.value - level) < small:
        text += "; clear of chance, but a small difference"
    return Verdict(holds, text, mean.numbers(name))


def named_findings(names: Sequence[str] | None = None) -> list[Finding]:
    """Findings by the names of their files, in the order of their numbers; None = all.

    Raises:
        ValueError: a name does not exist.
    """
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    known = [name for name in known if name not in ("__init__", "base")]
    for name in names or ():
        if name not in known:
            raise ValueError(f"task.findings: {name!r} is none of {', '.join(known)}.")
    found = []
    for name in known if names is None else names:
        module = importlib.import_module(f"fna_lab.finding.{name}")
        kinds = [
            kind
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if kind.__module__ == module.__name__ and issubclass(kind, Finding)
        ]
        found.append(kinds[0]())
    return sorted(found, key=lambda finding: finding.number)
