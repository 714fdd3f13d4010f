"""What every detector sees and promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fna_lab import ops
from fna_lab.settings import check_number


@dataclass
class Evidence:
    """What one block shows of its tokens.

    Attributes:
        x: the block's input `[b n c]`.
        num_prefix_tokens: CLS and registers before the patch tokens.
        has_cls: whether token 0 is CLS.
        grid: (rows, columns) of the patch tokens, None where unknown.
        q: queries `[b h n d]`; None for a detector that reads hidden states alone.
        k: keys `[b h n d]`; None likewise.
        scale: factor of the logits.
        bias: the host's mask: added to the logits, or bool with True = may attend, and then
            made a bias; broadcastable to `[b h n n]`; None = nothing.
        found: tokens found in earlier rounds, bool `[b n]`; None in the first.
        stage: how those were taken out of this block's attention (`type1`), `mask` or `sink`.
        kept: tokens that are no padding, bool `[b n]`; None = all. The bias takes the others
            out of attention.
        neurons: the MLP neurons that the detector lists, after their activation, `[b n k]`; None
            for a detector that lists none.
        prepared: what the detector's own `prepare` returned for this host.
    """

    x: Tensor
    num_prefix_tokens: int
    has_cls: bool
    grid: tuple[int, int] | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    found: Tensor | None = None
    stage: str = "mask"
    kept: Tensor | None = None
    neurons: Tensor | None = None
    prepared: Any = None

    def __post_init__(self) -> None:
        self.bias = ops.as_bias(self.bias, self.x.dtype)

    def candidates(self) -> Tensor:
        """Tokens that may be found: no prefix, no padding, none found before; bool `[b n]`."""
        free = torch.arange(self.x.shape[1], device=self.x.device) >= self.num_prefix_tokens
        free = free.expand(self.x.shape[:2])
        return free if self.gone is None else free & ~self.gone

    @property
    def gone(self) -> Tensor | None:
        """Tokens that were found before, and padding; bool `[b n]`, None where there are none."""
        if self.found is None or self.kept is None:
            return self.found if self.kept is None else ~self.kept
        return self.found | ~self.kept

    def cls_row(self) -> Tensor:
        """The attention of CLS, under what was found before: `[b h 1 n]`, in O(n d)."""
        q, k = self._queries_and_keys()
        return ops.attention_rows(q, k, slice(0, 1), **self._logits())

    def pattern(self) -> Tensor:
        """The attention of every token: `[b h n n]`, in at least float32."""
        q, k = self._queries_and_keys()
        return ops.attention_rows(q, k, slice(None), **self._logits())

    def incoming(self) -> Tensor:
        """Attention that each token draws in each head: `[b h n]`, in chunks of queries."""
        q, k = self._queries_and_keys()
        return ops.incoming_by_head(q, k, kept=self.kept, **self._logits())

    def incoming_share(self) -> Tensor:
        """Share of the others' attention that each patch token draws: `[b n]`, in chunks."""
        q, k = self._queries_and_keys()
        more = {"prefix": self.num_prefix_tokens, "kept": self.kept}
        return ops.incoming_share(q, k, **more, **self._logits())

    def _queries_and_keys(self) -> tuple[Tensor, Tensor]:
        if self.q is None or self.k is None:
            raise ValueError("Expected evidence with q and k, got hidden states alone.")
        return self.q, self.k

    def _logits(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("scale", "bias", "found", "stage")}


class Detector(ABC):
    """Marks the tokens of T, each picture on its own; stateless.

    Attributes:
        reads: `hidden` = the input of the detection block; `attention` = its queries and keys
            too; `neurons` = the input, and the activations of `neurons`.
        finds: the class that its tokens get, `massive` or `artifact`.
        neurons: `(layer, neuron)` pairs of MLP neurons that it reads, of blocks before detection.
    """

    reads: str = "hidden"
    finds: str = "massive"
    neurons: Sequence[tuple[int, int]] = ()

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`; prefix tokens and tokens found before are False."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> Tensor:
        """How far each token stands out, `[b n]`: within T, the first to be taken is highest.

        Prefix tokens and tokens found before are -inf.
        """

    def prepare(self, blocks: Sequence[nn.Module], detect: int) -> Any:  # noqa: ARG002
        """What only the host's weights tell, once a patch; handed back as `evidence.prepared`."""
        return None

    @property
    def name(self) -> str:
        """The detector's name in `conf/mask/detector`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def threshold(self) -> str:
        """Its setting that decides how many tokens are found, as `setting=value`."""
        return ""


def token_norms(evidence: Evidence) -> Tensor:
    """Norms of the candidates in medians of the picture's patch tokens, others -inf: `[b n]`."""
    norms = ops.patch_norms(evidence.x, evidence.num_prefix_tokens)
    norms = norms / ops.medians(norms, evidence.kept)
    prefix = norms.new_zeros((norms.shape[0], evidence.num_prefix_tokens))
    norms = torch.cat([prefix, norms], dim=1)
    return norms.masked_fill(~evidence.candidates(), -torch.inf)


def check_positive(setting: str, value: object, *, zero: bool = False) -> None:
    """Raise unless a setting of a detector is a number > 0, or 0 where that is allowed.

    Raises:
        ValueError: naming the setting and its value.
    """
    name = f"mask.detector.{setting}"
    if zero:
        check_number(name, value, "a number >= 0", least=0)
    else:
        check_number(name, value, "a number > 0", above=0)
