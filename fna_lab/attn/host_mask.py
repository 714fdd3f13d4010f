"""What a host's attention mask says: padding, a bias, or pairs that nobody can honour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fna_lab import ops

Parts = tuple[Tensor | None, Tensor | None]  # keys that may be attended to, bias of the logits


@dataclass(frozen=True)
class _Read:
    """What was read of a mask, for as long as it stays as it was."""

    mask: Tensor
    version: int
    keys: Tensor | None
    bias: Tensor | None = None

    def knows(self, mask: Tensor) -> bool:
        mine = self.mask
        alike = (mine.shape, mine.stride(), mine.dtype) == (mask.shape, mask.stride(), mask.dtype)
        return alike and mine.data_ptr() == mask.data_ptr() and self.version == _version(mask)


@dataclass
class HostMasks:
    """Reads masks once for all blocks of a forward pass that are handed the same one.

    A mask of all pairs takes O(n^2) to read, and those that are no bool wait for the device.

    Attributes:
        last: what was read of the last mask's padding, and
        parts: what it came apart to; None = nothing yet.
    """

    last: _Read | None = None
    parts: _Read | None = None

    def kept(self, mask: Tensor | None) -> Tensor | None:
        """`ops.kept_tokens`: tokens that are no padding, bool `[b n]`; None = no padding mask."""
        if mask is None or torch.compiler.is_compiling():  # a graph asks nothing of a tensor
            return ops.kept_tokens(mask)
        if self.last is None or not self.last.knows(mask):
            self.last = _Read(mask, _version(mask), ops.kept_tokens(mask))
        return self.last.keys

    def split(self, mask: Tensor | None, queries: int, name: str) -> Parts:
        """A mask as keys that may be attended to, bool `[b n]`, and a bias of the logits.

        Args:
            mask: as SDPA takes it.
            queries: how many tokens ask.
            name: of the variant, for messages.

        Raises:
            NotImplementedError: it keeps some queries from some keys.
        """
        if mask is None:
            return None, None
        if torch.compiler.is_compiling():
            return self._parts(mask, queries, name)
        if self.parts is None or not self.parts.knows(mask):
            self.parts = _Read(mask, _version(mask), *self._parts(mask, queries, name))
        return self.parts.keys, self.parts.bias

    def _parts(self, mask: Tensor, queries: int, name: str) -> Parts:
        keys = self.kept(mask)
        single = mask.dtype != torch.bool and mask.shape[1] == 1
        if keys is None and single and torch.compiler.is_compiling():
            # What padding is it may ask; whether queries differ besides stays in the bias.
            keys = (mask[:, 0] > -ops.FAR).any(1)
        if keys is not None:
            return keys, None if mask.dtype == torch.bool else _bias(mask, keys, queries)
        bars = mask.dtype == torch.bool
        if not bars and not torch.compiler.is_compiling():
            bars = bool((mask < -ops.FAR).any())
        if bars:
            raise NotImplementedError(
                f"attn={name} cannot honour the host's attention mask of shape "
                f"{tuple(mask.shape)}, which keeps some queries from some keys (causal?): "
                "expected a padding mask [b 1 1 n] or a finite bias. Point blocks= at a tower "
                "that attends both ways, or use attn=exact."
            )
        return None, mask


def _bias(mask: Tensor, keys: Tensor, queries: int) -> Tensor | None:
    """What a float mask adds to the logits of keys that are no padding; None = nothing."""
    bias = mask.masked_fill(~keys[:, None, None], 0)
    if bias.shape[2] == bias.shape[3]:  # rows of padding are nobody's
        bias = bias.masked_fill(~keys[:, None, :, None], 0)
    # A compiler cannot ask, and takes it for a bias.
    asked = torch.compiler.is_compiling() or bool(bias.any())
    return bias.expand(-1, -1, queries, -1) if asked else None


def _version(mask: Tensor) -> int:
    """Grows with every change in place; of tensors of inference mode nobody counts."""
    return 0 if mask.is_inference() else mask._version
