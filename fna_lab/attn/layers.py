"""Which blocks of the host: every way of writing a layer range, and how often of those."""

from __future__ import annotations

from collections.abc import Iterable


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
    elif isinstance(layers, int):
        found = [layers]
    elif isinstance(layers, Iterable):
        found = list(layers)
    else:
        raise ValueError(f"{setting}={layers!r}: expected layers such as 6-11, [6, 7] or 0.5.")
    for layer in found:
        if not isinstance(layer, int) or not 0 <= layer < depth:
            raise ValueError(
                f"{setting}={layers!r}: block {layer!r} does not exist; "
                f"the backbone has {depth} blocks, 0 to {depth - 1}."
            )
    if not found:
        raise ValueError(f"{setting}={layers!r} names no block; expected at least one.")
    return tuple(sorted(set(found)))


def read_renewal(renew: object) -> int:
    """After how many layers something is taken anew; 0 = never.

    Raises:
        ValueError: neither `never`, `every` nor an integer >= 0.
    """
    every = {"never": 0, "every": 1}.get(renew) if isinstance(renew, str) else renew
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(
            f"attn.renew={renew!r}: expected never, every, or an integer n >= 0 "
            "(every n layers, 0 = never)."
        )
    return every


def _parse_text(text: str, depth: int, setting: str) -> list[int]:
    if text.strip() == "all":
        return list(range(depth))
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
