"""The only call of Hydra's `instantiate`: a config node becomes the object that it names."""

from __future__ import annotations

import inspect
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig


def build(node: DictConfig, **more: Any) -> Any:
    """Build what `_target_` names; None where it names nothing.

    Args:
        node: settings with a `_target_`.
        **more: arguments that only a run can give.

    Raises:
        TypeError: the target does not take these settings.
        Exception: whatever the target itself raises, unwrapped.
    """
    if node.get("_target_") is None:
        return None
    try:
        return hydra.utils.instantiate(node, **more)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, InstantiationException):
            raise
        if isinstance(cause, TypeError) and _unbound(node, more):
            raise TypeError(_unbound(node, more)) from cause
        raise cause from None


def _unbound(node: DictConfig, more: dict[str, Any]) -> str:
    """Why the settings do not bind to the target's signature, empty where they do."""
    target = hydra.utils.get_object(node["_target_"])
    settings = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    try:
        inspect.signature(target).bind(**{**settings, **more})
    except TypeError as error:
        known = [name for name in inspect.signature(target).parameters if name not in more]
        return f"{node['_target_']}: {error}; its settings are {', '.join(known)}."
    return ""
