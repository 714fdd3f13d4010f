"""Attention variants and mask strategies by the names of their files."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypeVar

from fna_lab.attn.base import AttentionVariant
from fna_lab.mask.base import Mask

Variant = TypeVar("Variant", AttentionVariant, Mask)


def named_attention(name: str, **settings: Any) -> AttentionVariant:
    """The variant of a file of `fna_lab.attn`, with these settings.

    Raises:
        ValueError: the name or a setting does not exist.
    """
    return resolve(name, AttentionVariant, "fna_lab.attn", settings)


def resolve(
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
