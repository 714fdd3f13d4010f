"""Checks of settings, in the words of the command line."""

from __future__ import annotations

import math
from numbers import Real

from fna_lab.ops.checks import is_whole

__all__ = ["check_flag", "check_integer", "check_number", "is_whole"]


def check_integer(
    setting: str, value: object, *, least: int | None = 1, optional: bool = False
) -> None:
    """Raise unless a setting is an integer of at least `least`, or None where that is `optional`.

    Raises:
        ValueError: naming the setting and its value.
    """
    if optional and value is None:
        return
    if is_whole(value) and (least is None or int(value) >= least):
        return
    wanted = "an integer" if least is None else f"an integer >= {least}"
    wanted += ", or null" if optional else ""
    raise ValueError(f"{setting}={value!r}: expected {wanted}.")


def check_number(
    setting: str,
    value: object,
    expected: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless a setting is a finite number within bounds.

    Args:
        setting: its name.
        value: what was given.
        expected: the bounds in words.
        above: it must be larger.
        least: it must be at least that.
        most: it must be at most that.
        below: it must be smaller.

    Raises:
        ValueError: naming the setting and its value.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        if above < float(value) < below and least <= float(value) <= most:
            return
    raise ValueError(f"{setting}={value!r}: expected {expected}.")


def check_flag(setting: str, value: object) -> None:
    """Raise unless a setting is true or false.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{setting}={value!r}: expected true or false.")
