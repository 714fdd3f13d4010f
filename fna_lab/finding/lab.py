"""A batch of pictures and a backbone, run under the interventions that findings need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context
from fna_lab.backbone.base import Backbone, Features
from fna_lab.backbone.patch import Patch, patch
from fna_lab.backbone.replay import Replay
from fna_lab.hosts import noted
from fna_lab.mask.base import Mask
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.iterative_masking import IterativeMaskingMask
from fna_lab.mask.iterative_sinking import IterativeSinkingMask
from fna_lab.mask.type1 import Type1Mask
from fna_lab.mask.type2 import Type2Mask


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

    def __call__(self, evidence: Evidence) -> Tensor:  # noqa: ARG002
        """The given tokens."""
        return self.tokens

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
        self.kept = backbone.kept(images)
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
        norms = norms / self.medians(norms)
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

    @torch.no_grad()
    def strongest(self, tokens: Tensor, stage: str) -> Tensor:
        """The strongest sink beside given ones that are taken out: a[CLS, t] / a[CLS, CLS] `[b]`.

        Without CLS, the largest incoming attention in uniform shares. Only the blocks from the
        restart to the detection block run, on what the restart block got from the plain model.
        """
        seen: list[Tensor] = []
        backbone, detect = self.backbone, self.backbone.anatomy.detect

        def observe(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:  # noqa: ARG001
            if context.layer == detect:
                # A replay passes no embedding that would tell the patch of registers.
                shown = Evidence(
                    context.x, backbone.num_prefix_tokens, backbone.has_cls,
                    q=q, k=k, scale=context.scale, bias=context.attn_mask, found=tokens,
                    stage=stage, kept=context.kept,
                )  # fmt: skip
                seen.append(ClsProxyDetector(ratio=1.0).scores(shown).amax(1))

        mask = Type1Mask(stage=stage, detector=Given(tokens), detect=self.deep[0])
        replay = self._replay  # its one pass through the whole model must be a plain one
        with self._patched("exact", mask, range(self.deep[0], detect + 1)) as handle:
            handle.observer = observe
            replay()
        return seen[0]

    @cached_property
    def _replay(self) -> Replay:
        anatomy = self.backbone.anatomy
        return self.backbone.replay(self.images, anatomy.restart, anatomy.detect)

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
        **settings: Any,
    ) -> Trace:
        """One forward pass.

        Args:
            attn: the variant.
            mask: the strategy.
            layers: blocks that both act on; None = from the anatomy's mask block on.
            **settings: of the variant, where it is a name.
        """
        if layers is None:
            layers = range(self.backbone.anatomy.mask, self.backbone.depth)
        handle = self._patched(attn, mask, layers, **settings)
        try:
            with noted(self.backbone.blocks) as hidden:
                features = self.backbone(self.images)
            return Trace(hidden, features, handle.tokens, handle.ranks, handle.strengths)
        finally:
            handle.remove()

    def _patched(
        self,
        attn: str | AttentionVariant,
        mask: str | Mask,
        layers: Sequence[int],
        **settings: Any,
    ) -> Patch:
        anatomy = self.backbone.anatomy
        return patch(
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

    def norms(self, x: Tensor) -> Tensor:
        """Norms of the patch tokens, in at least float32: `[b n c]` -> `[b p]`; padding has 0."""
        norms = ops.patch_norms(x, self.backbone.num_prefix_tokens)
        return norms if self.kept is None else norms * ops.patches_of(self.kept, norms)

    def medians(self, norms: Tensor) -> Tensor:
        """Medians over the patch tokens that are no padding: `[b p]` -> `[b 1]`."""
        return ops.medians(norms, self.kept)

    def others(self, tokens: Tensor) -> Tensor:
        """Patch tokens that are neither in a set nor padding: bool `[b n]` -> `[b p]`."""
        others = ~self.of_patches(tokens)
        return others if self.kept is None else others & self.of_patches(self.kept)

    def of_patches(self, tokens: Tensor) -> Tensor:
        """The part of a token set that patch tokens are: `[b n]` -> `[b p]`."""
        return tokens[:, self.backbone.num_prefix_tokens :]

    def correct(self, features: Features) -> Tensor | None:
        """Whether the zero-shot class is right, 0 or 1 `[b]`; None without texts or labels."""
        if self.texts is None or self.labels is None:
            return None
        unit = F.normalize(features.pooled.float(), dim=-1)
        return ((unit @ self.texts.mT).argmax(1) == self.labels).double()
