"""Blocks whose linear layers add no bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class WithoutBias(TorchFunctionMode):
    """Leaves out the bias of some linear layers while it is entered; no weight is touched.

    The blocks must be patched: a hook would miss `nn.MultiheadAttention`, which calls its output
    projection as a function, and which only the seam opens.

    Args:
        layers: those layers.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.biases = {id(layer.bias) for layer in layers if layer.bias is not None}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ARG002 (the protocol's signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `F.linear` without a bias where it is one of these; everything else as it is."""
        kwargs = kwargs or {}
        if (
            func is F.linear
            and id(args[2] if len(args) > 2 else kwargs.get("bias")) in self.biases
        ):
            return func(*args[:2])
        return func(*args, **kwargs)
