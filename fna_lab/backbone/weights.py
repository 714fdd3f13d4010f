"""Weights from a local file: read safely, checked, explained in one line where they do not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
NESTINGS = ("state_dict", "model", "teacher", "module", "state_dict_ema")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a local file, in at least float32.

    Pickles are read with `weights_only`, so that a file cannot run code. The usual nestings
    (`state_dict`, `model`, `teacher`) and prefixes (`module.`, `backbone.`) are taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or holds NaN or infinity.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"backbone.checkpoint={path}: there is no such file.")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"backbone.checkpoint={path}: expected a file that ends in {', '.join(SUFFIXES)}."
        )
    try:
        if path.suffix == ".safetensors":
            state: object = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"backbone.checkpoint={path} cannot be read: {reason}") from error
    tensors = _unwrap(state)
    if not tensors:
        raise ValueError(f"backbone.checkpoint={path} holds no weights.")
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"backbone.checkpoint={path}: {key} holds {bad} values that are NaN or infinite."
            )
    return tensors


def load_fitting(load: Callable[[], Model], path: str | Path, name: str) -> Model:
    """Run a loader that raises torch's long mismatch error, and say it in one line.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    try:
        return load()
    except (RuntimeError, KeyError, AssertionError, ValueError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        detail = " ".join(lines[1:] or lines)
        detail = detail if len(detail) < 260 else detail[:260] + " ..."
        raise ValueError(
            f"backbone.checkpoint={path} does not fit backbone={name}: {detail}"
        ) from error


def explain_missing_weights(name: str, error: Exception) -> FileNotFoundError:
    """What to do where pretrained weights cannot be had."""
    reason = (str(error).strip().split("\n") or [""])[0][:140]
    return FileNotFoundError(
        f"backbone={name}: its pretrained weights are neither in the local cache nor to be "
        f"downloaded ({type(error).__name__}: {reason}). Give a file with "
        "backbone.checkpoint=PATH, connect to the model hub once, or take random weights with "
        "backbone.pretrained=false."
    )


def _unwrap(state: object) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(state, Mapping):
            return {}
        inner = next((state[k] for k in NESTINGS if isinstance(state.get(k), Mapping)), None)
        if inner is None:
            break
        state = inner
    assert isinstance(state, Mapping)
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "backbone."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
