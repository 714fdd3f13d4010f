"""Massive tokens: where the register neurons of earlier blocks fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fna_lab.mask.detector.base import Detector, Evidence, check_positive


class RegisterNeuronsDetector(Detector):
    """Patch tokens at which the listed MLP neurons fire far above the picture's mean.

    The neurons are those of one host; `fna_lab.backbone.neurons.find_register_neurons` finds them
    by a few pictures that have massive tokens.

    Args:
        neurons: `[[block, neuron], ...]`, of blocks before the detection block.
        ratio: threshold of the mean |activation| of the neurons, in means of the picture's patch
            tokens that were not found before.

    Raises:
        ValueError: a setting is out of range.

    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers".
    """

    reads = "neurons"

    def __init__(
        self, *, neurons: Sequence[Sequence[int]] | None = None, ratio: float = 5.0
    ) -> None:
        check_positive("ratio", ratio)
        self.ratio = ratio
        pairs: Sequence[Sequence[int]] = [] if neurons is None else neurons
        if neurons is not None and not (_is_list(pairs) and pairs and all(map(_is_pair, pairs))):
            raise ValueError(
                f"mask.detector.neurons={neurons}: expected [[block, neuron], ...], whole numbers "
                "from 0 on."
            )
        self.neurons = [(int(pair[0]), int(pair[1])) for pair in pairs]

    def prepare(self, blocks: Sequence[nn.Module], detect: int) -> Any:
        """Nothing; refuses a list of neurons that do not run before the detection block.

        Raises:
            ValueError: the list is missing, or a block lies too late.
        """
        del blocks
        if not self.neurons:
            raise ValueError(
                "mask.detector.neurons=null: expected [[block, neuron], ...]; "
                "fna_lab.backbone.neurons.find_register_neurons finds them by a few pictures."
            )
        late = [pair for pair in self.neurons if pair[0] >= detect]
        if late:
            raise ValueError(
                f"mask.detector.neurons={[list(pair) for pair in late]}: expected neurons of "
                f"blocks before block {detect}, at whose input tokens are detected."
            )

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return self.scores(evidence) > self.ratio

    def scores(self, evidence: Evidence) -> Tensor:
        """Mean |activation| of the neurons, in means of the picture: `[b n]`.

        Raises:
            ValueError: the evidence holds no activations.
        """
        if evidence.neurons is None:
            raise ValueError("Expected evidence with activations of neurons, got none.")
        wide = torch.promote_types(evidence.neurons.dtype, torch.float32)
        strength = evidence.neurons.to(wide).abs().mean(-1)
        candidates = evidence.candidates()
        total = strength.masked_fill(~candidates, 0.0).sum(1, keepdim=True)
        mean = total / candidates.sum(1, keepdim=True).clamp(min=1)
        return (strength / mean.clamp(min=1e-30)).masked_fill(~candidates, -torch.inf)

    @property
    def threshold(self) -> str:
        return f"ratio={self.ratio}"


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_pair(pair: Any) -> bool:
    return _is_list(pair) and len(pair) == 2 and all(type(x) is int and x >= 0 for x in pair)
