"""What every attention variant receives and promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle as Handle

from fna_lab import ops
from fna_lab.attn.guard import Guard
from fna_lab.attn.host_mask import HostMasks
from fna_lab.attn.stopwatch import Stopwatch


@dataclass(frozen=True)
class Removal:
    """Which (query, key) pairs a mask strategy takes away at one layer.

    Attributes:
        tokens: the token set T, bool `[b n]`.
        pattern: a name of `fna_lab.ops.PATTERNS`.
        stage: `mask` (before softmax) or `sink` (after it).
        rows: indices of T, long `[b t]`, padded to the largest set of the batch.
        valid: bool `[b t]`, False where `rows` is padding.
    """

    tokens: Tensor
    pattern: str
    stage: str
    rows: Tensor
    valid: Tensor


@dataclass
class Context:
    """One attention call of the host, seen from outside.

    Attributes:
        layer: 0-based index of the block that is running.
        nth: how many blocks with this variant ran before it in the same forward pass.
        scale: factor of the logits, in the host's own convention.
        x: the block's input `[b n c]`; in joint blocks the picture's tokens, then the text's.
        num_prefix_tokens: CLS and registers before the patch tokens.
        num_extra_tokens: tokens that are appended behind the host's own.
        has_cls: whether token 0 is CLS.
        num_suffix_tokens: tokens of a text behind the patch tokens, in joint blocks.
        grid: (rows, columns) of the patch tokens, None where unknown.
        attn_mask: the host's own mask or bias, as SDPA takes it.
        removal: what the mask strategy takes away at this layer.
        shared: what earlier layers of the same forward pass left for later ones; tensors, also
            those of named tuples, have a row for each picture.
        stopwatch: notes the time of parts, None where nobody measures.
        classes: token classes that the variant asked for by `token_classes`, bool `[b n]` each.
        reweigh: changes the attention weights `[b h n n]`, where a mask strategy does so.
        depth: number of blocks of the host, None where unknown.
        stays: whether the host goes on with the output; False where a block runs to look for
            tokens alone.
        masks: what earlier layers read of the host's masks; None = nothing is kept.
    """

    layer: int
    nth: int
    scale: float
    x: Tensor
    num_prefix_tokens: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    attn_mask: Tensor | None = None
    removal: Removal | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    classes: dict[str, Tensor] = field(default_factory=dict)
    reweigh: Callable[[Tensor], Tensor] | None = None
    num_extra_tokens: int = 0
    num_suffix_tokens: int = 0
    depth: int | None = None
    stays: bool = True
    masks: HostMasks | None = None

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Notes the time inside the `with` for a part (`selection`), where anybody measures."""
        return nullcontext() if self.stopwatch is None else self.stopwatch.timed(part)

    @property
    def reading(self) -> HostMasks:
        """What reads the host's mask."""
        return self.masks or HostMasks()

    @property
    def kept(self) -> Tensor | None:
        """The host's own tokens that are no padding, bool `[b n]`; None = all are."""
        kept = self.reading.kept(self.attn_mask)
        kept = ops.kept_before(kept, self.x, self.num_extra_tokens)
        return None if kept is None else kept.expand(self.x.shape[0], -1)

    @property
    def removed(self) -> Tensor | None:
        """Keys that nobody else may attend to: T bool `[b n]` of a `mask` stage, else None."""
        return self.removal.tokens if self.removal and self.removal.stage == "mask" else None


class AttentionVariant(ABC):
    """Attention over `(q, k, v)`; stateless, so that one object serves every layer and picture.

    Attributes:
        patterns: the mask patterns that the variant honours, in both stages.
        reweighs: whether it honours strategies that change weights.
        extends: whether it honours strategies that append tokens behind the host's own.
        joins: whether it honours text tokens behind the patch tokens, as joint blocks have them.
        min_tokens: the fewest tokens that it can work on.
        token_classes: classes (`massive`, `artifact`) that must be detected for it.
        num_extra_tokens: tokens that its `hooks` append behind the host's own.
        guard: watches its answers, None = nobody does.
        calibration_pictures: pictures that `calibrate` wants to see; 0 = it is not called.
        counts_padding: whether segments, pairs or shares of tokens are cut with padding among
            them, so that a padded picture is not attended to quite as it is alone. What padding
            holds never matters.
    """

    patterns: Iterable[str] = ()
    reweighs: bool = False
    extends: bool = False
    joins: bool = False
    min_tokens: int = 1
    token_classes: tuple[str, ...] = ()
    num_extra_tokens: int = 0
    guard: Guard | None = None
    calibration_pictures: int = 0
    counts_padding: bool = False

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`, independent of the other pictures of a batch."""

    @property
    def name(self) -> str:
        """The variant's name in `conf/attn`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, selection included."""
        del channels
        return layers * ops.attention_flops(tokens, heads, head_dim)

    def hooks(
        self,
        blocks: Sequence[nn.Module],  # noqa: ARG002
        layers: Sequence[int],  # noqa: ARG002
        *,
        enabled: Callable[[], bool],  # noqa: ARG002
        prefix: Callable[[Tensor], int],  # noqa: ARG002
        kept: Callable[[], Tensor | None],  # noqa: ARG002
    ) -> Iterable[Handle]:
        """Hooks on the host that the variant needs beside the seam; removed with the patch.

        Args:
            blocks: the host's blocks, in order.
            layers: those whose attention is replaced.
            enabled: whether the patch is switched on; hooks that change anything must ask.
            prefix: hidden states `[b n c]` of the running pass -> number of prefix tokens.
            kept: the host's tokens of the running block that are no padding, bool `[b n]`; None =
                all, and nothing is appended.
        """
        return ()

    def calibrate(
        self,
        forward: Callable[[], object],  # noqa: ARG002
        blocks: Sequence[nn.Module],  # noqa: ARG002
        layers: Sequence[int],  # noqa: ARG002
    ) -> AttentionVariant:
        """The variant with what a few pictures settle, before the host is patched.

        Args:
            forward: runs `calibration_pictures` pictures through the unpatched host.
            blocks: the host's blocks, in order.
            layers: those whose attention will be replaced.

        Returns:
            A settled copy; itself where there is nothing to settle.
        """
        return self

    def check_tokens(self, tokens: int) -> None:  # noqa: ARG002, B027 (most need no check)
        """Refuse, before any data is read, pictures of too few tokens.

        Raises:
            ValueError: naming the setting, its value and the number of tokens.
        """

    def check_layers(self, layers: Sequence[int]) -> None:  # noqa: ARG002, B027
        """Refuse, before any data is read, blocks that do not fit settings given block by block.

        Raises:
            ValueError: naming the setting, its value and the blocks.
        """

    def check(self, pattern: str) -> None:
        """Refuse, before any data is read, a mask pattern that the variant cannot honour.

        Raises:
            NotImplementedError: naming the variant, the pattern and those that it honours.
        """
        if pattern not in self.patterns:
            raise NotImplementedError(
                f"attn={self.name} cannot honour the mask pattern {pattern!r}; "
                f"it honours {', '.join(self.patterns) or 'none'}. Use attn=exact for others."
            )


class KeyMaskedAttention(AttentionVariant):
    """Attention over kept keys; the part that approximations share.

    It turns padding and removed tokens into one set of keys that may be attended to, hands the
    rest to `attend`, and puts right the rows of tokens of T that still see themselves (`type2`),
    exactly and for O(|T| n d); unless the variant `removes` them in a cheaper way.
    """

    patterns = ("type1", "type2")

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        *,
        keys: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Attend to kept keys.

        Args:
            q: queries `[b h n d]`.
            k: keys `[b h n d]`.
            v: values `[b h n d]`.
            context: of the block.
            keys: bool `[b n]`, True = may be attended to; None = all.
            bias: added to the logits, `[b|1 h|1 n n]`; None = nothing.
        """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        keys, bias = self.keys(q, context)
        removal = context.removal
        if removal is None or self.removes(removal, v, bias):
            return self.attend(q, k, v, context, keys=keys, bias=bias)
        values = v
        if removal.stage == "sink":
            values = ops.zero_rows(v, removal.tokens, (removal.rows, removal.valid))
        out = self.attend(q, k, values, context, keys=keys, bias=bias)
        if removal.pattern == "type1":
            return out
        return ops.restore_own_rows(
            out,
            q,
            k,
            v,
            removal.rows,
            removal.valid,
            stage=removal.stage,
            scale=context.scale,
            keys=keys,
            bias=bias,
        )

    def removes(self, removal: Removal, v: Tensor, bias: Tensor | None) -> bool:  # noqa: ARG002
        """Whether `attend` sees to all of a removal itself, and not to its keys alone."""
        return False

    def keys(self, q: Tensor, context: Context) -> tuple[Tensor | None, Tensor | None]:
        """Keys that may be attended to, bool `[b n]` (None = all), and the bias of the logits."""
        keys, bias = context.reading.split(context.attn_mask, q.shape[2], self.name)
        keys = None if keys is None else keys.expand(q.shape[0], -1)
        if context.removed is not None:
            keys = ~context.removed if keys is None else keys & ~context.removed
        return keys, bias


class NoAttention(AttentionVariant):
    """Attention that is switched off; the bias of the output projection is all that is left."""

    joins = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Zeros, `[b h n d]`."""
        return torch.zeros_like(v)


def attend_without(removal: Removal, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Exact attention under the host's mask, without the pairs that are removed: `[b h n d]`."""
    return ops.masked_attention(
        q,
        k,
        v,
        removal.tokens,
        pattern=removal.pattern,
        stage=removal.stage,
        scale=context.scale,
        bias=ops.as_bias(context.attn_mask, q.dtype),
        rows=(removal.rows, removal.valid),
    )
