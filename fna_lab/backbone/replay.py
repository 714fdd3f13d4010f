"""Running some blocks of a host again, on the inputs that a forward pass gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fna_lab.hosts import given, hidden, noted, tokens_first, with_hidden


class Replay:
    """Blocks `first` to `last` of a host, without the rest of the model.

    Each block gets the arguments that it got in one forward pass (rotary tables, biases), and the
    hidden states that the block before it now gives.

    Args:
        blocks: the host's blocks, in order.
        run: runs the host once.
        first: the first block that runs again.
        last: the last one.

    Attributes:
        inputs: what block `first` got in that pass, `[b n c]`.
        outputs: what every block of the host gave, `[b n c]` each.

    Raises:
        ValueError: the blocks are none of the host's.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], run: Callable[[], Any], first: int, last: int
    ) -> None:
        if not 0 <= first <= last < len(blocks):
            raise ValueError(
                f"Expected 0 <= first <= last < {len(blocks)}, got first={first}, last={last}."
            )
        self._blocks = blocks
        self._turn = tokens_first(blocks[first])
        self._span = range(first, last + 1)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        hooks = []
        for layer in self._span:

            def note(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                self._calls[layer] = args, kwargs

            hooks.append(blocks[layer].register_forward_pre_hook(note, with_kwargs=True))
        try:
            with noted(blocks) as self.outputs:
                run()
        finally:
            for hook in hooks:
                hook.remove()
        self.inputs = hidden(*self._calls[first], f"{first}", turn=self._turn)

    def __call__(self) -> list[Tensor]:
        """What the blocks give now, `[b n c]` each."""
        found: list[Tensor] = []
        for layer in self._span:
            args, kwargs = self._calls[layer]
            if found:
                args, kwargs = with_hidden(args, kwargs, found[-1], turn=self._turn)
            found.append(given(self._blocks[layer](*args, **kwargs), turn=self._turn))
        return found
