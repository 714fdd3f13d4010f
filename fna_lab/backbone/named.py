"""Attention variants, mask strategies and landmark samplers by the names of their files."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any, TypeVar

import fna_lab.attn.landmarks
from fna_lab.attn.base import AttentionVariant
from fna_lab.attn.landmarks.base import LandmarkSampler
from fna_lab.mask.base import Mask

Variant = TypeVar("Variant", AttentionVariant, Mask)


def named_attention(name: str, **settings: Any) -> AttentionVariant:
    """The variant of a file of `fna_lab.attn`, with these settings.

    Raises:
        ValueError: the name or a setting does not exist.
    """
    return resolve(name, AttentionVariant, "fna_lab.attn", settings)


def named_sampler(named: str, said: str, more: tuple[str, ...] = ()) -> LandmarkSampler:
    """The sampler of `fps` or `fps:block=8,sketch=64`: a file of `fna_lab.attn.landmarks`.

    Args:
        named: its name and settings.
        said: the setting that names it, for messages.
        more: what else that setting may name, for messages.

    Raises:
        ValueError: the name or a setting does not exist.
    """
    stem, _, settings = named.partition(":")
    folder = Path(fna_lab.attn.landmarks.__file__).parent
    known = sorted({p.stem for p in folder.glob("*.py")} - {"__init__", "base"})
    if stem not in known:
        choice = ", ".join((*known, *more))
        raise ValueError(f"{said}: there is no such sampler; known: {choice}.")
    module = importlib.import_module(f"fna_lab.attn.landmarks.{stem}")
    (cls,) = (
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, LandmarkSampler) and cls.__module__ == module.__name__
    )
    known = list(inspect.signature(cls).parameters)
    given: dict[str, Any] = {}
    for one in filter(None, settings.split(",")):
        key, _, value = one.partition("=")
        if key not in known:
            raise ValueError(
                f"{said}: {stem} has no setting {key}; known: {', '.join(known) or 'none'}."
            )
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{said}: expected {key}=VALUE, a number or None.") from None
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from None


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
