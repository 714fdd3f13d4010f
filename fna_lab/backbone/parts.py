"""The linear layers of a block that analyses need, whatever the host calls them."""

from __future__ import annotations

from torch import nn

ATTENTION = ("attn", "attention")


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
