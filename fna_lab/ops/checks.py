"""Argument checks and defaults, shared by the public functions of this package."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor


def check_float(name: str, value: object, ndim: int, shape: str) -> None:
    """Raise unless `value` is a floating tensor of `ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a tensor {shape}, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"Expected {name} to be a floating tensor, got {value.dtype}.")
    if value.ndim != ndim:
        raise ValueError(f"Expected {name} to have shape {shape}, got {tuple(value.shape)}.")


def check_bool(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise unless `value` is a bool tensor of exactly `shape`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Expected {name} to be a bool tensor, got {came}.")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"Expected {name} to have shape {shape}, got {tuple(value.shape)}.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q `[b h m d]`, k and v `[b h n d]` fit together."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_float(name, value, 4, "[b h n d]")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "Expected q [b h m d], k [b h n d] and v [b h n d] to fit, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    check_same_device(q=q, k=k, v=v)


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors lie on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"Expected all arguments on one device, got {devices}.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, numpy's included, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name: str, value: object, *, least: int = 1, most: int | None = None) -> None:
    """Raise unless `value` is an integer within bounds, and no truth value."""
    if is_whole(value) and least <= value and (most is None or value <= most):
        return
    bounds = f">= {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"Expected {name} to be an integer {bounds}, got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"Expected {name} to be one of {', '.join(choices)}, got {value!r}.")


def check_index(
    name: str,
    value: object,
    shape: str,
    ndims: tuple[int, ...] = (2,),
    *,
    below: int | None = None,
) -> None:
    """Raise unless `value` is a long tensor `[b m]`, or one of so many dimensions.

    Of several pictures on a CPU, also unless all of it lies from 0 to `below` - 1: their rows may
    lie in one table, where the next picture's would be read.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.long:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Expected {name} to be a long tensor {shape}, got {came}.")
    if value.ndim not in ndims:
        raise ValueError(f"Expected {name} to have shape {shape}, got {tuple(value.shape)}.")
    if below is None or len(value) < 2 or value.numel() == 0 or value.device.type != "cpu":
        return
    if torch.compiler.is_compiling():
        return
    least, most = (int(end) for end in value.aminmax())
    if least < 0 or most >= below:
        raise ValueError(f"Expected {name} from 0 to {below - 1}, got {least} to {most}.")


def default_scale(q: Tensor) -> float:
    """d^-1/2, the factor of the logits where none is given."""
    return float(q.shape[-1]) ** -0.5
