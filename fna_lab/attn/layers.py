"""Which blocks of the host, how often of those, and how many landmarks in each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fna_lab.settings import is_whole

Copied = TypeVar("Copied", bound="BlockCounts")
Counts = int | Mapping[int, int] | Sequence[int]


def parse_layers(layers: object, depth: int, *, setting: str) -> tuple[int, ...]:
    """Block indices from any way of writing them.

    Args:
        layers: an index (`6`), a list, a `range`, text such as `"6-11"`, `"6,8-11"`, `"6-"` or
            `"all"`, or a fraction of the depth from which on (`0.5`).
        depth: number of blocks of the host.
        setting: the setting's name, for messages.

    Returns:
        Sorted 0-based indices, each once.

    Raises:
        ValueError: a layer lies beyond the depth, or the text cannot be read.
    """
    if isinstance(layers, str):
        found = _parse_text(layers, depth, setting)
    elif isinstance(layers, bool):
        raise ValueError(f"{setting}={layers}: expected layers such as 6-11, [6, 7] or 0.5.")
    elif isinstance(layers, float):
        if not 0 <= layers < 1:
            raise ValueError(f"{setting}={layers}: a fraction of the depth must lie in [0, 1).")
        found = list(range(round(layers * depth), depth))
    elif isinstance(layers, Integral):
        found = [int(layers)]
    elif isinstance(layers, Iterable):
        # Also of numpy and torch, whose integers are none of Python's.
        found = layers.tolist() if isinstance(layers, np.ndarray | Tensor) else list(layers)
        found = [int(i) if is_whole(i) else i for i in found]
    else:
        raise ValueError(f"{setting}={layers!r}: expected layers such as 6-11, [6, 7] or 0.5.")
    for layer in found:
        if not is_whole(layer) or not 0 <= layer < depth:
            raise ValueError(
                f"{setting}={layers!r}: block {layer!r} does not exist; "
                f"the backbone has {depth} blocks, 0 to {depth - 1}."
            )
    if not found:
        raise ValueError(f"{setting}={layers!r} names no block; expected at least one.")
    return tuple(sorted(set(found)))


class Renewal:
    """At which layers something is taken anew.

    Args:
        renew: `every` layer; an integer n for every n of the replaced blocks; `never` or 0 = at
            the first of them alone; `settled` = every layer up to the middle of the host, where
            tokens change most from one to the next, and every third beyond.

    Raises:
        ValueError: something else.
    """

    def __init__(self, renew: int | str) -> None:
        named = {"never": 0, "every": 1, "settled": 1}
        every = named.get(renew) if isinstance(renew, str) else renew
        if not is_whole(every) or every < 0:
            raise ValueError(
                f"attn.renew={renew!r}: expected every, settled, never, or an integer n >= 0 "
                "(every n layers, 0 = never)."
            )
        self.every = every
        self.settles = renew == "settled"

    def due(self, nth: int, layer: int, depth: int | None, last: int) -> bool:
        """Whether it is, at a layer of a host of such a depth.

        Args:
            nth: how many layers were replaced before.
            layer: 0-based index.
            depth: number of layers of the host, None where unknown.
            last: the layer at which it was taken anew last.
        """
        middle = layer if depth is None or not self.settles else depth // 2
        if layer > middle:
            return (layer - middle) // 3 > (last - middle) // 3
        return nth % self.every == 0 if self.every else nth == 0


def _parse_text(text: str, depth: int, setting: str) -> list[int]:
    if text.strip() == "all":
        return list(range(depth))
    if re.fullmatch(r"\d*\.\d+", text.strip()):  # a fraction, as command lines write it
        return list(parse_layers(float(text), depth, setting=setting))
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        try:
            start = int(first)
            stop = (int(last) if last else depth - 1) if dash else start
        except ValueError:
            raise ValueError(
                f"{setting}={text!r}: cannot read {part!r}; expected layers such as 6-11."
            ) from None
        if stop < start:
            raise ValueError(f"{setting}={text!r}: the range {part!r} runs backwards.")
        found += range(start, stop + 1)
    return found


class BlockCounts:
    """So many landmarks: one number for every block, or block by block.

    Args:
        counts: a number, a mapping from blocks to numbers (`{6: 64, 7: 32}`), or a list of
            numbers, one for each replaced block in ascending order.

    Attributes:
        num_landmarks: how many, in the block that has most of them.
        min_tokens: the fewest tokens that they can be taken from.

    Raises:
        ValueError: something else, or a number below 1.
    """

    def __init__(self, counts: Counts) -> None:
        self._by_block: dict[int, int] | list[int] | None = None
        if isinstance(counts, Integral | str):
            several: list[Any] = [counts]
        elif isinstance(counts, Mapping):
            self._by_block = dict(counts)
            several = [*self._by_block.values()]
        elif isinstance(counts, Sequence):
            self._by_block = several = list(counts)
        else:
            several = [counts]
        whole = [*several, *(counts if isinstance(counts, Mapping) else ())]
        if not several or not all(map(is_whole, whole)) or min(several) < 1:
            raise ValueError(
                f"attn.num_landmarks={counts!r}: expected an integer >= 1, or one for each block "
                "such as {6: 64, 7: 32} or [64, 32]."
            )
        self.num_landmarks = int(max(several))
        self.min_tokens = self.num_landmarks

    def with_landmarks(self: Copied, counts: Counts) -> Copied:
        """A copy with other numbers of landmarks."""
        twin = copy.copy(self)
        BlockCounts.__init__(twin, counts)
        return twin

    def landmarks_at(self, layer: int, nth: int) -> int:
        """How many landmarks a block has, the `nth` of those that are replaced."""
        given = self._by_block
        if given is None:
            return self.num_landmarks
        return given[layer] if isinstance(given, dict) else given[nth]

    def counts(self, layers: int) -> list[int]:
        """How many landmarks each of so many replaced blocks has."""
        given = self._by_block
        if isinstance(given, dict):
            given = [given[layer] for layer in sorted(given)]
        return [self.num_landmarks] * layers if given is None else given[:layers]

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse numbers of landmarks for other blocks than those that are replaced.

        Raises:
            ValueError: naming the numbers and the blocks.
        """
        given = self._by_block
        if given is None:
            return
        if len(given) != len(layers) or isinstance(given, dict) and set(given) != set(layers):
            raise ValueError(
                f"attn.num_landmarks={given}: expected one number for each of the replaced blocks "
                f"{', '.join(map(str, layers))}."
            )
