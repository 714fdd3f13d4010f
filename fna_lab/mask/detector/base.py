"""What every detector promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Detector(ABC):
    """Marks the tokens of T, each picture on its own.

    Attributes:
        reads: `hidden` = the input hidden states of the detection block `[b n c]`;
            `cls_row` = the attention of CLS in that block `[b h 1 n]`.
    """

    reads: str = "hidden"

    @abstractmethod
    def __call__(self, evidence: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """What `reads` names -> bool `[b n]`, prefix tokens False."""

    @property
    def name(self) -> str:
        """The detector's name in `conf/mask/detector`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def threshold(self) -> str:
        """Its setting that decides how many tokens are found, as `setting=value`."""
        return ""
