"""The linear layers of a block that analyses need, whatever the host calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTION = ("attn", "attention")
# How hosts call the factor of the attention branch: timm, open_clip, transformers, BEiT.
SCALES = ("ls1.", "ls_1.", "layer_scale1.", "gamma_1")


def out_projection(block: nn.Module) -> nn.Linear:
    """The output projection of a block's attention; its weight is `[c h*d]`.

    Raises:
        ValueError: the block has none that is known.
    """
    for name, module in block.named_children():
        if not any(word in name.lower() for word in ATTENTION) or _is_norm(module):
            continue
        # The last square layer of the attention: q, k and v come before it in every host.
        found = [part for part in module.modules() if isinstance(part, nn.Linear)]
        found = [part for part in found if part.in_features == part.out_features]
        if found:
            return found[-1]
    raise ValueError(f"{type(block).__name__} has no output projection that fna_lab knows.")


def out_weight(block: nn.Module) -> Tensor:
    """The weight `[c h*d]` by which attention reaches the residual stream, LayerScale included.

    Raises:
        ValueError: the block has no output projection that is known.
    """
    weight = out_projection(block).weight
    for name, scale in block.named_parameters():
        if name.startswith(SCALES) and scale.ndim == 1:
            return scale[:, None] * weight
    return weight


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


def mlp_output(block: nn.Module) -> nn.Linear:
    """The last layer of a block's MLP; its input are the neurons after the activation.

    Raises:
        ValueError: the block has none that is known.
    """
    width = out_projection(block).out_features
    found = [
        part
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == width
    ]
    # Attention comes first in every host; what narrows back to the channels last is the MLP.
    if found and found[-1] is not out_projection(block):
        return found[-1]
    raise ValueError(f"{type(block).__name__} has no MLP that fna_lab knows.")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
