"""What every finding is: a claim, a measurement on pictures, and a verdict with its numbers."""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fna_lab import ops
from fna_lab.backbone.base import Backbone
from fna_lab.finding.lab import Lab


@dataclass(frozen=True)
class Verdict:
    """What a finding comes to on one backbone.

    Attributes:
        holds: None = these pictures and this backbone cannot tell.
        says: why, in one sentence with numbers. What `judge` gives has `{samples}` or `{sample}`
            where the data's own word for its pictures belongs.
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
    def judge(self, found: Mapping[str, Tensor], backbone: Backbone) -> Verdict:
        """What the numbers of all pictures, `[n]` or `[n r]`, come to."""

    def verdict(
        self, found: Mapping[str, Tensor], backbone: Backbone, samples: str = "pictures"
    ) -> Verdict:
        """What they come to, in the data's own words.

        Args:
            found: as `measure` gives them, of all pictures.
            backbone: that they are of.
            samples: what the data calls its pictures, in the plural.
        """
        judged = self.judge(found, backbone)
        return replace(judged, says=judged.says.format(samples=samples, sample=samples[:-1]))

    @property
    def name(self) -> str:
        """The finding's name: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]


# What is said where no picture can tell.
NONE_TAKEN = "no {sample} here has such tokens, so nothing can be taken away"
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
    return values.double().masked_fill(~where, math.nan)


def compared(
    mean: Mean | None, level: float, says: str, name: str, *, above: bool, small: float = 0.0
) -> Verdict:
    """The verdict on a mean that is claimed to lie above (or below) a level, interval and all.

    Args:
        mean: None = no picture can tell.
        level: what would be no effect.
        says: a sentence with `{mean}` or `{change}` (of a log ratio, in words), `{n}` and
            `{samples}`.
        name: of the number.
        above: which side is claimed.
        small: a smaller difference from the level is called so, however sure it is.
    """
    if mean is None:
        return Verdict(None, NONE_TAKEN)
    up, down = mean.low > level, mean.high < level
    holds = None if not (up or down) else up == above
    text = says.format(mean=mean.said(), change=mean.change(), n=mean.count, samples="{samples}")
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
    known = [name for name in known if name not in ("__init__", "base", "lab")]
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
