"""The only call of Hydra's `instantiate`: a config node becomes the object that it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _listed(value: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(kind, value))


# Annotation -> whether a value of a config is one, and what to call it.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_int, "an integer"),
    "float": (lambda value: _is_int(value) or isinstance(value, float), "a number"),
    "str": (_is_str, "text"),
    "None": (lambda value: value is None, "null"),
    "Sequence[str]": (lambda value: _listed(value, _is_str), "a list of names"),
    "Sequence[int]": (lambda value: _listed(value, _is_int), "a list of integers"),
    "tuple[int, int]": (lambda value: _listed(value, _is_int) and len(value) == 2, "two integers"),
}


def build(node: DictConfig, *, aside: Sequence[str] = (), **more: Any) -> Any:
    """Build what `_target_` names; None where it names nothing.

    Args:
        node: settings with a `_target_`.
        aside: settings that are the run's, not the target's.
        **more: arguments that only a run can give.

    Raises:
        TypeError: the target does not take these settings, or not these values; the message
            names them.
        Exception: whatever the target itself raises, unwrapped.
    """
    if node.get("_target_") is None:
        return None
    own = node.copy()  # of the same parent, so that it knows its place in the config
    OmegaConf.set_struct(own, False)
    aside = [name for name in aside if name in own]
    for name in aside:
        del own[name]
    try:
        built = hydra.utils.instantiate(own, **more)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, InstantiationException):
            raise
        said = _unbound(own, aside, more) if isinstance(cause, TypeError) else ""
        said = said or mistyped(own)
        # What a target says of the same setting knows more: `expected an integer >= 1`.
        if said and not str(cause).startswith(said.partition(": expected")[0]):
            raise TypeError(said) from cause
        if not own["_target_"].startswith("fna_lab.") and not isinstance(cause, OSError):
            # Another library's words do not say which part of the config they are about.
            key = str(own._get_full_key(None))  # pyright: ignore[reportPrivateUsage]
            raise ValueError(f"{key}={_choice(key, own)}: {cause}") from cause
        raise cause from None
    said = mistyped(own, taken=True)
    if said:  # that nothing objected does not make it right
        raise TypeError(said)
    return built


def _unbound(node: DictConfig, aside: Sequence[str], more: dict[str, Any]) -> str:
    """Why the settings of a node or of one inside it do not bind, empty where they do."""
    for key, part in _nodes(node):
        given, aside = (more, aside) if part is node else ({}, ())
        target = hydra.utils.get_object(part["_target_"])
        takes = [p for p in _parameters(target) if p.name not in given]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in takes)
        known = [p.name for p in takes if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        settings = {str(name): part[name] for name in part if not str(name).startswith("_")}
        strange = [] if open_ended else [name for name in settings if name not in known]
        missing = [p.name for p in takes if p.name in known and p.default is p.empty]
        missing = [name for name in missing if name not in settings]
        chosen = f"{key.replace('.', '/')}={_choice(key, part)}"
        if strange:
            said = ", ".join(f"{key}.{name}={settings[name]}" for name in strange)
            out = " ".join(f"~{key}.{name}" for name in strange)
            them = ("setting", "it") if len(strange) == 1 else ("settings", "them")
            return (
                f"{said}: {chosen} has no such {them[0]}; expected "
                f"{', '.join([*known, *aside]) or 'none'}. {_who(key, strange[0], them[1])}"
                f"Leave {them[1]} out ({out}), or choose another {key.replace('.', '/')}."
            )
        if missing:
            said = ", ".join(f"{key}.{name}" for name in missing)
            return f"{said}: not set, and {chosen} needs it."
    return ""


def mistyped(node: DictConfig, taken: bool = False) -> str:
    """Which setting has a value of another type than the signature says, empty where none.

    A name alone is no list of names, unless the target has `taken` it for one.
    """
    for key, part in _nodes(node):
        if not part["_target_"].startswith("fna_lab."):
            continue
        for parameter in _parameters(hydra.utils.get_object(part["_target_"])):
            name, kinds = parameter.name, _kinds(parameter.annotation)
            if not kinds or name not in part:  # not there, or ???
                continue
            value = part[name]
            value = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
            if taken and "Sequence[str]" in kinds and _is_str(value):
                continue
            if not any(KINDS[kind][0](value) for kind in kinds):
                wanted = " or ".join(KINDS[kind][1] for kind in kinds)
                return f"{key}.{name}={value!r}: expected {wanted}."
    return ""


def _kinds(annotation: object) -> list[str]:
    """The plain types of an annotation, as `KINDS` has them; none where there are others."""
    kinds = [kind.strip() for kind in str(annotation).split("|")]
    return kinds if all(kind in KINDS for kind in kinds) else []


def _nodes(node: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """A node and those with a `_target_` inside it, with their places in the config."""
    yield str(node._get_full_key(None)), node  # pyright: ignore[reportPrivateUsage]
    for name in node:
        part = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(part, DictConfig) and part.get("_target_") is not None:
            yield from _nodes(part)


def _parameters(target: Any) -> list[inspect.Parameter]:
    """What a target takes; where a class hands `**common` on, what its parents take, too."""
    chain = [target]
    if inspect.isclass(target):
        kinds = [kind for kind in target.__mro__ if kind is not object]
        chain = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)]
    found: dict[str, inspect.Parameter] = {}
    for function in chain:
        found = {name: p for name, p in found.items() if p.kind is not p.VAR_KEYWORD}
        takes = inspect.signature(function).parameters
        found |= {name: p for name, p in takes.items() if name not in (*found, "self")}
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            break
    return list(found.values())


def _choice(key: str, node: DictConfig) -> str:
    """The option of a group that is chosen; that of the target's file where Hydra is not asked."""
    group = key.replace(".", "/")
    if HydraConfig.initialized() and group in HydraConfig.get().runtime.choices:
        return str(HydraConfig.get().runtime.choices[group])
    return str(node["_target_"]).split(".")[-2]


def _who(key: str, name: str, them: str) -> str:
    """The experiment that sets a setting, where the command line does not."""
    if not HydraConfig.initialized():
        return ""
    asked = HydraConfig.get()
    experiment = asked.runtime.choices.get("experiment")
    mine = any(text.lstrip("+").startswith(f"{key}.{name}=") for text in asked.overrides.task)
    return "" if mine or not experiment else f"experiment={experiment} sets {them}. "
