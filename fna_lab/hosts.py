"""What the blocks of a host take and give, and their linear layers, whatever the host calls them.

Hidden states are `[b n c]` here; hosts whose `nn.MultiheadAttention` keeps tokens first hand round
`[n b c]`, and everybody who reads or changes them says so by `turn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ATTENTION = ("attn", "attention")
# How hosts call the factor of the attention branch: timm, open_clip, transformers, BEiT.
SCALES = ("ls1.", "ls_1.", "layer_scale1.", "gamma_1")


def tokens_first(block: nn.Module) -> bool:
    """Whether a block takes and gives `[n b c]`, as its `nn.MultiheadAttention` does."""
    heads = [part for part in block.modules() if isinstance(part, nn.MultiheadAttention)]
    return any(not part.batch_first for part in heads)


def hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], where: str, *, turn: bool = False
) -> Tensor:
    """The hidden states `[b n c]` among a block's arguments.

    Args:
        args: its positional arguments and
        kwargs: those by name.
        where: its name, for messages.
        turn: whether it takes them as `[n b c]`.

    Raises:
        NotImplementedError: there are none of that shape.
    """
    x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if isinstance(x, Tensor) and x.ndim == 3:
        return x.transpose(0, 1) if turn else x
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise NotImplementedError(
        f"Block {where} receives {shape}; expected hidden states [batch tokens channels]. "
        "Windowed hosts are not supported."
    )


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, *, turn: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states `[b n c]`; see `hidden`."""
    x = x.transpose(0, 1) if turn else x
    if args:
        return (x, *args[1:]), kwargs
    return args, kwargs | {"hidden_states" if "hidden_states" in kwargs else "x": x}


def is_joint(block: nn.Module) -> bool:
    """Whether a block attends over its own tokens and those of a text behind them."""
    # diffusers' JointTransformerBlock; those that put the text first have no such attribute.
    return isinstance(getattr(block, "context_pre_only", None), bool)


def text_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The text tokens `[b t c]` that a joint block is handed; None in other blocks."""
    if not is_joint(block):
        return None
    return args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]


def kept_of(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    read: Callable[[Tensor], Tensor | None],
) -> Tensor | None:
    """Tokens that are no padding, bool `[b n]`, by the mask that a block is handed; else None.

    `read` tells them by a mask, as `ops.kept_tokens` does.
    """
    parts = (part for part in (*args, *kwargs.values()) if isinstance(part, Tensor))
    masks = (read(part) for part in parts if part.ndim == 4)
    return next((kept for kept in masks if kept is not None), None)


def given(out: Any, *, turn: bool = False) -> Tensor:
    """The hidden states `[b n c]` among what a block gives.

    Args:
        out: what it returns: a tensor, or a tuple that begins with it.
        turn: whether that is `[n b c]`.
    """
    x = out[0] if isinstance(out, tuple) else out
    return x.transpose(0, 1) if turn else x


def with_given(out: Any, x: Tensor, *, turn: bool = False) -> Any:
    """What a block gives, with other hidden states `[b n c]`; see `given`."""
    x = x.transpose(0, 1) if turn else x
    return (x, *out[1:]) if isinstance(out, tuple) else x


@contextmanager
def noted(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Note what these blocks give while the `with` runs: hidden states `[b n c]`, one a call."""
    seen: list[Tensor] = []
    handles = []
    for block in blocks:

        def note(block: nn.Module, args: Any, out: Any, turn: bool = tokens_first(block)) -> None:  # noqa: ARG001
            seen.append(given(out, turn=turn))

        handles.append(block.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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


def mlp_output(block: nn.Module) -> nn.Linear:
    """The last layer of a block's MLP; its input are the neurons after the activation.

    Raises:
        ValueError: the block has none that is known.
    """
    width = out_projection(block).out_features
    found = [part for part in block.modules() if isinstance(part, nn.Linear)]
    found = [part for part in found if part.out_features == width]
    # Attention comes first in every host; what narrows back to the channels last is the MLP.
    if found and found[-1] is not out_projection(block):
        return found[-1]
    raise ValueError(f"{type(block).__name__} has no MLP that fna_lab knows.")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
