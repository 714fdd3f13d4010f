"""What variants share that attend through fewer vectors than there are tokens."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context, KeyMaskedAttention
from fna_lab.attn.classes import DETECTED, prefix_tokens, read_classes, token_set
from fna_lab.attn.landmarks.base import HEAD_SOURCES, SOURCES, LandmarkSampler, sampled_points
from fna_lab.attn.layers import BlockCounts, Counts, Renewal
from fna_lab.settings import check_flag


class ReducedAttention(BlockCounts, KeyMaskedAttention):
    """Attention through fewer vectors than there are tokens.

    Args:
        num_landmarks: how many; one number, or one for each block (`{6: 64, 7: 32}`, or a list in
            the order of the replaced blocks).

    Attributes:
        stand_ins: what these vectors are called in messages.
        counts_at_will: whether any number of them will do, for `attn.layers=auto` to choose.

    Raises:
        ValueError: `num_landmarks` is no positive integer, nor such numbers block by block.
    """

    stand_ins = "landmarks"
    counts_at_will = True

    def __init__(self, *, num_landmarks: Counts) -> None:
        super().__init__(num_landmarks)

    def check_tokens(self, tokens: int) -> None:
        """Refuse more landmarks than tokens."""
        if self.num_landmarks > tokens:
            raise ValueError(
                f"attn.num_landmarks={self.num_landmarks}: more {self.stand_ins} than the "
                f"{tokens} tokens of a picture."
            )


class SegmentAttention(ReducedAttention):
    """Attention through means of equal segments of the tokens, every prefix token its own.

    Args:
        num_landmarks: segments, prefix tokens included; one number, or one a block.

    Raises:
        ValueError: `num_landmarks` is neither a positive integer nor such numbers by block.
    """

    stand_ins = "segments"
    counts_padding = True

    def segments(self, q: Tensor, keys: Tensor | None, context: Context) -> tuple[Tensor, int]:
        """The segment of each token of a block, long `[b n]`, -1 = no key; and how many there are.

        Raises:
            ValueError: too many segments for the tokens, or too few for the prefix tokens.
        """
        self.check_tokens(q.shape[2])
        num, prefix = self.landmarks_at(context.layer, context.nth), context.num_prefix_tokens
        if num <= prefix:
            raise ValueError(
                f"attn.num_landmarks={num}: expected at least {prefix + 1} segments, one for each "
                f"of {prefix} prefix tokens and one for the patch tokens."
            )
        found = ops.segment_members(q.shape[2], num, prefix=prefix, device=q.device)
        found = found.expand(q.shape[0], -1)
        return (found if keys is None else found.masked_fill(~keys, -1)), num


class LandmarkAttention(ReducedAttention):
    """Attention through a few landmark tokens; the part that its variants share.

    It chooses landmarks; removed or padded keys never become one. Guaranteed tokens come first,
    in ascending order, cut off at `num_landmarks`. Excluded tokens are never taken: a picture in
    which detected classes leave fewer tokens than landmarks has so many fewer landmarks, and one
    in which they leave none has a single one that is no padding.

    Args:
        landmarks: the sampler.
        num_landmarks: landmarks m of each picture, guaranteed ones included; see
            `ReducedAttention`.
        source: what it samples: the block's `input`, that input layer-`normed` (without the
            host's affine part), `q` or `k` of all heads side by side, or both (`qk`).
        renew: at which layers landmarks are taken anew: `every`, an integer for every so many,
            `never`, or `settled`; see `Renewal`.
        guarantee: token classes that are landmarks: cls, register, massive, artifact.
        exclude: token classes that are never landmarks.
        per_head: every head samples its own landmarks, from its own q or k (or both).

    Raises:
        TypeError: `landmarks` is no sampler.
        ValueError: a setting is out of range, or a class is both guaranteed and excluded.
    """

    joins = True

    def __init__(
        self,
        *,
        landmarks: LandmarkSampler,
        num_landmarks: Counts = 64,
        source: str = "normed",
        renew: int | str = 1,
        guarantee: Sequence[str] = ("cls",),
        exclude: Sequence[str] = (),
        per_head: bool = False,
    ) -> None:
        if not isinstance(landmarks, LandmarkSampler):
            raise TypeError(
                f"attn.landmarks={landmarks!r}: expected attn/landmarks=NAME on the command line, "
                "in Python a sampler of fna_lab.attn.landmarks."
            )
        if source not in SOURCES:
            raise ValueError(f"attn.source={source!r}: expected one of {', '.join(SOURCES)}.")
        check_flag("attn.per_head", per_head)
        if per_head and source not in HEAD_SOURCES:
            raise ValueError(
                f"attn.per_head=true with attn.source={source}: heads differ in their q and k "
                f"alone; expected attn.source to be one of {', '.join(HEAD_SOURCES)}."
            )
        super().__init__(num_landmarks=num_landmarks)
        self.landmarks = landmarks
        self.source = source
        self.per_head = per_head
        self.renewal = Renewal(renew)
        self.guarantee = read_classes("attn.guarantee", guarantee)
        self.exclude = read_classes("attn.exclude", exclude)
        both = ", ".join(c for c in self.guarantee if c in self.exclude)
        if both:
            raise ValueError(
                f"attn.exclude={list(self.exclude)}: {both} cannot be guaranteed and excluded."
            )
        used = (*self.guarantee, *self.exclude)
        self.token_classes = tuple(c for c in DETECTED if c in used)

    @abstractmethod
    def layer_flops(self, tokens: int, heads: int, head_dim: int) -> int:
        """FLOPs of the attention of one picture at one layer, without selection."""

    def flops(self, tokens: int, *, heads: int, head_dim: int, channels: int, layers: int) -> int:
        """FLOPs of the attention of one picture over so many layers, selection included.

        Which layers these are is not known: with `settled`, landmarks count as new in all of them.
        """
        times = heads if self.per_head else 1
        total = taken = 0
        for nth, num in enumerate(self.counts(layers)):
            total += self.with_landmarks(num).layer_flops(tokens, heads, head_dim)
            if num != taken or self.renewal.due(nth, 0, None, 0):
                total += times * self.selection_flops(tokens, channels // times, num)
            taken = num
        return total

    def selection_flops(self, tokens: int, channels: int, num: int) -> int:
        """FLOPs of new landmarks, for one picture or, with its channels, for one head of it."""
        width = channels if self.landmarks.reads == "attention" else self.width(channels)
        return self.landmarks.flops(tokens, width, num)

    @property
    def may_repeat(self) -> bool:
        """Whether landmarks may repeat where no key is removed: detected classes are excluded."""
        return any(c in DETECTED for c in self.exclude)

    def barred(self, keys: Tensor | None, context: Context) -> int | None:
        """How many tokens of a picture are no landmark at most, for keys bool `[b n]`.

        None where the host does not know.
        """
        if self.may_repeat:
            return None
        never = len(prefix_tokens(self.exclude, context))
        if keys is None:
            return never
        removal = context.removal
        # Under `torch.compile` the largest number of removed tokens is not known.
        if removal is None or context.attn_mask is not None or torch.compiler.is_compiling():
            return None
        return removal.rows.shape[1] + never

    def width(self, channels: int) -> int:
        """Channels of what is sampled, for so many of the host (or of its heads)."""
        return (2 if self.source == "qk" else 1) * channels

    def choose(self, q: Tensor, k: Tensor, keys: Tensor | None, context: Context) -> Tensor:
        """Landmarks, long `[b m]` or per head `[b h m]`: new, or of an earlier layer of this pass.

        Raises:
            ValueError: more landmarks than tokens that may be taken.
        """
        served = self.served(keys, context)
        return self.renewed(q, k, keys, context) if served is None else served

    def renewed(
        self,
        q: Tensor,
        k: Tensor,
        keys: Tensor | None,
        context: Context,
        points: Tensor | None = None,
    ) -> Tensor:
        """New landmarks, for this layer and those that it serves; see `choose`.

        `points` are what is sampled, `[b n c]` or per head `[b*h n c]`, where that is known.
        """
        num, slot = self.landmarks_at(context.layer, context.nth), slot_of(keys, context)
        sampling = self if num == self.num_landmarks else self.with_landmarks(num)
        with context.timed("selection"):
            context.shared[slot] = sampling._sample(q, k, keys, context, points)
        context.shared[f"{slot}: layer"] = context.layer
        context.shared[f"{slot}: tokens"] = context.x.shape[1]
        return context.shared[slot]

    def served(self, keys: Tensor | None, context: Context) -> Tensor | None:
        """Landmarks of an earlier layer that serve this one too; None = new ones are due."""
        slot = slot_of(keys, context)
        known = context.shared.get(slot)
        if known is None:
            return None
        if (len(known), context.shared[f"{slot}: tokens"]) != context.x.shape[:2]:
            return None  # a host that appends or drops tokens on the way
        last = context.shared[f"{slot}: layer"]
        if self.renewal.due(context.nth, context.layer, context.depth, last):
            return None
        return known if known.shape[-1] == self.landmarks_at(context.layer, context.nth) else None

    def taken(self, q: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """What the variant attended through in a block, once it has.

        Args:
            q: queries of the block `[b h n d]`.
            context: of the block, with which the variant was called.

        Returns:
            Landmarks long `[b m]`, or per head `[b h m]`; and the landmark of each token, its
            place among them, long `[b n]` or `[b h n]`, None without clusters.

        Raises:
            KeyError: the variant did not attend yet.
        """
        keys, _ = self.keys(q, context)
        slot = slot_of(keys, context)
        return context.shared[slot], context.shared.get(f"{slot}: members")

    def taken_by(self, sampler: LandmarkSampler, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """What another sampler would take in the place of the variant's own: as `taken`."""
        num = self.landmarks_at(context.layer, context.nth)
        twin = copy.copy(self if num == self.num_landmarks else self.with_landmarks(num))
        twin.landmarks = sampler
        keys, _ = self.keys(q, context)
        return twin._sample(q, k, keys, context, twin.points(q, k, context))

    def points(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:  # noqa: ARG002
        """What is sampled, `[b n c]` or per head `[b*h n c]`; None = the sampler asks for it."""
        return None

    def _sample(
        self,
        q: Tensor,
        k: Tensor,
        keys: Tensor | None,
        context: Context,
        points: Tensor | None,
    ) -> Tensor:
        size = q.shape[2]
        self.check_tokens(size)
        never = prefix_tokens(self.exclude, context)
        if size - len(never) < self.num_landmarks:
            raise ValueError(
                f"attn.num_landmarks={self.num_landmarks}: more landmarks than the "
                f"{size - len(never)} tokens that attn.exclude={list(self.exclude)} leaves."
            )
        allowed = keys
        if self.exclude:
            taboo = token_set(self.exclude, q.shape[0], size, context)
            allowed = ~taboo if keys is None else keys & ~taboo
        wanted = None
        if any(c in DETECTED for c in self.guarantee):
            wanted = token_set(self.guarantee, q.shape[0], size, context)
            wanted = wanted if allowed is None else wanted & allowed
        if points is None:
            points = sampled_points(
                self.landmarks, self.source, q, k, context, allowed=allowed, per_head=self.per_head
            )
        if self.per_head:  # heads are to a sampler what pictures are
            allowed, wanted = (
                None if found is None else found.repeat_interleave(q.shape[1], dim=0)
                for found in (allowed, wanted)
            )
        given = prefix_tokens(self.guarantee, context)[: self.num_landmarks]
        first = torch.arange(given.start, given.stop, device=q.device)
        barred = self.barred(keys, context)
        sampler = self.landmarks if allowed is None else self.landmarks.promised(barred)
        picks = sampler(
            points,
            self.num_landmarks,
            guaranteed=first.expand(points.shape[0], -1),
            allowed=allowed,
            num_prefix_tokens=context.num_prefix_tokens,
            grid=context.grid,
        )
        if wanted is not None:
            picks = ops.put_first(picks, wanted)
        if allowed is not None and (barred is None or size - barred < self.num_landmarks):
            # Some samplers take others where too few are left, and all of them what is
            # guaranteed, be it padding: the first that may be taken stands in for those; where
            # classes leave none, the first token that may be attended to.
            good = allowed.gather(1, picks)
            first = picks.gather(1, good.int().argmax(1, keepdim=True))
            if self.exclude and keys is not None:
                kept = keys.repeat_interleave(q.shape[1] if self.per_head else 1, dim=0)
                none = ~good.any(1, keepdim=True)
                first = torch.where(none, kept.int().argmax(1, keepdim=True), first)
            picks = torch.where(good, picks, first)
        return picks.unflatten(0, q.shape[:2]) if self.per_head else picks


def slot_of(keys: Tensor | None, context: Context) -> str:
    """Where landmarks among such keys are kept for later layers.

    Landmarks taken before a mask was known may hold removed tokens: those are never reused.
    """
    if context.removed is not None:
        return "landmarks without removed tokens"
    return "landmarks" if keys is None else "landmarks among kept keys"
