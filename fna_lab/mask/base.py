"""What every mask strategy is: tokens and how they are found, a pattern of pairs, a stage."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.settings import check_integer, is_whole

SCHEDULES = ("oneshot", "iterative")


def check_block(setting: str, value: object) -> None:
    """Raise unless a setting is the index of one block.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not is_whole(value) or value < 0:
        raise ValueError(f"{setting}={value!r}: expected the index of one block, from 0 on.")


class Mask:
    """Takes a pattern of (query, key) pairs of the detected tokens out of attention.

    Args:
        stage: `mask` = before softmax (the other weights grow), `sink` = after it (the mass is
            lost).
        detector: finds T in the same forward pass; None = `cls_proxy`.
        schedule: `oneshot` = T is what the detector finds at once; `iterative` = the blocks from
            `restart` to `detect` run again without what was found, until nothing new is. How
            often depends on the pictures, so that `torch.compile` cannot have it.
        per_round: of an iterative schedule, most tokens that a round adds, the ones that stand
            out most; None = all over the threshold.
        max_rounds: of an iterative schedule, most rounds.
        detect: block whose input (or attention) the detector reads; None = the backbone's.
        restart: first block that runs again; None = the backbone's.
        layers: blocks whose attention is masked; None = from the backbone's mask block on.

    Attributes:
        pattern: a name of `ops.PATTERNS`; None where no attention is masked.
        rewrites: whether tokens are changed, see `rewrite`.
        appends: whether tokens are appended behind the others, see `appended`.
        reweighs: whether weights are changed, see `reweigh`.
        corrects: whether the attention's output is changed, see `correct`.

    Raises:
        TypeError: `detector` is no detector.
        ValueError: a setting is out of range.
    """

    pattern: str | None = None
    rewrites = False
    appends = False
    reweighs = False
    corrects = False

    def __init__(
        self,
        *,
        stage: str = "mask",
        detector: Detector | None = None,
        schedule: str = "oneshot",
        per_round: int | None = 1,
        max_rounds: int = 50,
        detect: int | None = None,
        restart: int | None = None,
        layers: object = None,
    ) -> None:
        if detector is not None and not isinstance(detector, Detector):
            raise TypeError(
                f"mask.detector={detector!r}: expected mask/detector=NAME on the command line, in "
                "Python a detector of fna_lab.mask.detector."
            )
        if stage not in ops.STAGES:
            raise ValueError(f"mask.stage={stage!r}: expected one of {', '.join(ops.STAGES)}.")
        if schedule not in SCHEDULES:
            raise ValueError(f"mask.schedule={schedule!r}: expected {' or '.join(SCHEDULES)}.")
        for name, value in (("per_round", per_round), ("max_rounds", max_rounds)):
            check_integer(f"mask.{name}", value, optional=name == "per_round")
        for name, value in (("detect", detect), ("restart", restart)):
            if value is not None:
                check_block(f"mask.{name}", value)
        self.stage = stage
        self.detector = detector or ClsProxyDetector()
        self.schedule = schedule
        self.per_round = per_round
        self.max_rounds = max_rounds
        self.detect = detect
        self.restart = restart
        self.layers = layers

    @property
    def looks(self) -> bool:
        """Whether tokens are looked for at all."""
        return self.acts

    @property
    def depends(self) -> bool:
        """Whether what is done depends on the tokens that are found."""
        return self.looks and self.pattern not in ops.WITHOUT_TOKENS

    @property
    def acts(self) -> bool:
        """Whether anything is done at all."""
        return self.pattern is not None or self.rewrites or self.reweighs or self.corrects

    @property
    def rounds(self) -> int:
        """Most rounds in which tokens are looked for; 1 = one-shot."""
        return self.max_rounds if self.schedule == "iterative" else 1

    @property
    def masks_before(self) -> bool:
        """Whether blocks before detection can be masked: they run again once T is known."""
        return self.rounds > 1 and self.pattern is not None

    @property
    def name(self) -> str:
        """The strategy's name in `conf/mask`: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def rewrite(
        self,
        x: Tensor,
        tokens: Tensor,  # noqa: ARG002 (strategies that mask attention leave tokens alone)
        *,
        num_prefix_tokens: int,  # noqa: ARG002
        grid: tuple[int, int] | None,  # noqa: ARG002
        kept: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """New hidden states `[b n c]` for the first masked block, given T bool `[b n]`.

        `kept` bool `[b n]` marks tokens that are no padding; None = all.
        """
        return x

    def appended(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[b t c]` that are appended at the first masked block, given T bool `[b n]`.

        With bool `[b t]`, False where they are padding, which nobody may attend to.
        """
        return x[:, :0], tokens[:, :0]

    def reweigh(self, weights: Tensor, tokens: Tensor, *, num_prefix_tokens: int) -> Tensor:  # noqa: ARG002
        """New attention weights `[b h n n]` of a masked block, given T bool `[b n]`."""
        return weights

    def correct(
        self,
        weights: Tensor,  # noqa: ARG002
        x: Tensor,
        v: Tensor,  # noqa: ARG002
        out_weight: Tensor,  # noqa: ARG002
        tokens: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """What is added to the attention's output of a masked block, `[b n c]`.

        Args:
            weights: exact attention `[b h n n]`.
            x: the block's input `[b n c]`.
            v: values `[b h n d]`.
            out_weight: weight of the output projection `[c h*d]`.
            tokens: T, bool `[b n]`.
        """
        return torch.zeros_like(x)
