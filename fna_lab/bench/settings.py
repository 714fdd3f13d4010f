"""What a benchmark measures, whether the command line asks or a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

import torch

MASKS = ("type1-mask", "type1-sink", "type2-mask", "type2-sink")
DTYPES = ("float32", "bfloat16", "float16")
# What each part of a benchmark has no use for.
OF_MODEL = ("checkpoint", "block", "img_size", "layers")
OF_INPUTS = ("tokens", "heads", "head_dim")
OF_ATTENTION = ("variants", "masks", "masked_tokens", "dtype", "exact_limit", "slowest", "layers",
                "memory")  # fmt: skip


@dataclass
class Settings:
    """Settings of a benchmark.

    Attributes:
        variants: names of conf/attn and of public packages; `all` or None = all of them (but in
            whole models `block_svd`, which has to be named there).
        samplers: landmark samplers, names or `name:setting=value,...`; None = the common ones.
        tokens: sizes, CLS included.
        batch: pictures of a batch, several sizes.
        dtype: of the inputs, names of `DTYPES`.
        heads: attention heads.
        head_dim: channels of a head; points to sample have heads x head_dim of them.
        landmarks: of variants that have that setting, and of samplers.
        masks: `<pattern>-<stage>` of `MASKS`, each beside the same variant without a mask.
        masked_tokens: that a mask takes away.
        exact_limit: most tokens of exact attention.
        slowest: seconds that no call may be expected to take.
        rounds: most rounds of a case.
        least: fewest rounds of a case.
        seconds: of a case, about.
        memory: measure peak memory, too.
        model: a timm ViT whose whole forward passes are timed, or whose tokens are sampled.
        img_size: sides of its pictures.
        layers: its blocks that are replaced.
        checkpoint: its weights, where its tokens are sampled.
        block: whose input is sampled.
        device: where it runs.
        progress: show a bar.
        prefix: of settings in messages: `--`, as on the command line, or `task.`.

    Raises:
        ValueError: a setting is out of range.
    """

    variants: Sequence[str] | None = None
    samplers: Sequence[str] | None = None
    tokens: Sequence[int] = (197, 1370, 4097, 16385, 65537)
    batch: Sequence[int] = (1,)
    dtype: Sequence[str] = ("float32",)
    heads: int = 6
    head_dim: int = 64
    landmarks: int = 64
    masks: Sequence[str] = ()
    masked_tokens: int = 4
    exact_limit: int = 20000
    slowest: float = 10
    rounds: int = 15
    least: int = 3
    seconds: float = 10
    memory: bool = True
    model: str | None = None
    img_size: Sequence[int] = (518,)
    layers: str = "6-"
    checkpoint: str | None = None
    block: int = 6
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: bool = True
    prefix: str = "--"

    def __post_init__(self) -> None:
        counts = ("heads", "head_dim", "landmarks", "masked_tokens", "exact_limit", "rounds",
                  "least")  # fmt: skip
        for name, least in (*((name, 1) for name in counts), ("tokens", 2), ("batch", 1)):
            value = getattr(self, name)
            several = name in ("tokens", "batch")
            parts = value if several and _is_list(value) else [value]
            if not parts or several != _is_list(value) or any(_below(p, least) for p in parts):
                wanted = f"a list of integers >= {least}" if several else f"an integer >= {least}"
                raise ValueError(f"{self.named(name, value)}: expected {wanted}.")
        for name in ("slowest", "seconds"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"{self.named(name, value)}: expected a number > 0.")
        for name, known in (("dtype", DTYPES), ("masks", MASKS)):
            value = getattr(self, name)
            empty = name == "dtype" and not value
            if not _is_list(value) or empty or any(part not in known for part in value):
                raise ValueError(
                    f"{self.named(name, value)}: expected a list of {', '.join(known)}."
                )
        for name in ("variants", "samplers"):
            value = getattr(self, name)
            if value is not None and (not _is_list(value) or not value):
                raise ValueError(f"{self.named(name, value)}: expected a list of names.")
        least = min(self.tokens)
        if self.masks and self.masked_tokens >= least:
            raise ValueError(
                f"{self.named('masked_tokens', self.masked_tokens)}: expected at most "
                f"{least - 1}, for CLS stays of the {least} tokens in "
                f"{self.named('tokens', self.tokens)}."
            )

    def check_used(self, part: str, model: str, selection: str) -> None:
        """Refuse settings that would do nothing here.

        Args:
            part: `attention` or `selection`; with a `model` of the settings, on that.
            model: how the caller asks for a model, for messages.
            selection: how it asks for samplers alone.

        Raises:
            ValueError: one that is not as usual has no use; the message says with what it has.
        """
        alone = part == "selection"
        useless = {name: f"with {selection}" for name in (OF_ATTENTION if alone else ())}
        if not alone:
            useless |= dict.fromkeys(("samplers", "checkpoint", "block"), f"without {selection}")
        if not self.model:
            useless |= dict.fromkeys(OF_MODEL, f"without {model}")
        else:
            whole = () if alone else ("masks", "masked_tokens", "exact_limit", "slowest")
            useless |= dict.fromkeys((*OF_INPUTS, *whole), f"with {model}")
        if not self.masks:
            useless.setdefault("masked_tokens", f"without {self.named('masks')}")
        usual = {one.name: one.default for one in fields(self)}
        for name, where in useless.items():
            value = getattr(self, name)
            value = tuple(value) if _is_list(value) else value
            if value != usual[name]:
                instead = "leave it out"
                if self.prefix != "--":
                    instead = f"expected {_written(usual[name])}"
                said = self.named(name, getattr(self, name))
                raise ValueError(f"{said}: it does nothing {where}; {instead}.")

    def named(self, setting: str, value: object = None) -> str:
        """A setting, and its value, as the one who asked writes it."""
        if self.prefix != "--":
            return f"{self.prefix}{setting}" + ("" if value is None else f"={value}")
        if value is False:
            return f"--no-{setting}"
        value = " ".join(map(str, value)) if _is_list(value) else value
        return f"--{setting.replace('_', '-')}" + ("" if value is None else f" {value}")


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _written(value: object) -> str:
    """A value as a YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _below(value: object, least: int) -> bool:
    return isinstance(value, bool) or not isinstance(value, int) or value < least
