"""A run's config as plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"attn": "fna", "attn.num_landmarks": 64, ...}` of a nested config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            if "_target_" in value:
                flat[prefix + key] = option(value)
            flat |= flatten(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            flat[prefix + key] = str(value)
    return flat


def option(node: Mapping[str, Any]) -> str:
    """What a part of a config is called: the name of its file, or of the backbone."""
    if node.get("name") and "backbone" in str(node.get("_target_")):
        return str(node["name"])
    return str(node["_target_"]).rsplit(".", 2)[-2] if node["_target_"] else "none"
