"""Sinks: patch tokens that draw far more attention than the others."""

from __future__ import annotations

from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive


class IncomingDetector(Detector):
    """Incoming attention above nine uniform shares (`raw`) or seven deviations (`std`).

    All tokens above the threshold are found; a schedule that takes one a round takes the highest.

    Args:
        rule: `raw` or `std`; see `ops.incoming_sinks`.
        factor: the threshold; None = 9 for `raw`, 7 for `std`, as published.
        log: `std` on the logarithm of the incoming attention.

    Raises:
        ValueError: a setting is out of range.
    """

    reads = "attention"
    finds = "artifact"

    def __init__(
        self, *, rule: str = "raw", factor: float | None = None, log: bool = False
    ) -> None:
        if rule not in tuple(ops.INCOMING_RULES):
            known = ", ".join(ops.INCOMING_RULES)
            raise ValueError(f"mask.detector.rule={rule!r}: expected one of {known}.")
        if factor is not None:
            check_positive("factor", factor)
        if log and rule != "std":
            raise ValueError(f"mask.detector.log={log}: expected false with rule={rule}.")
        self.rule = rule
        self.factor = ops.INCOMING_RULES[rule] if factor is None else factor
        self.log = log

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return self._judge(evidence)[0]

    def scores(self, evidence: Evidence) -> Tensor:
        """Uniform shares (`raw`) or standard deviations above the mean (`std`): `[b n]`."""
        return self._judge(evidence)[1]

    def _judge(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return ops.incoming_sinks(
            evidence.incoming_share(),
            prefix=evidence.num_prefix_tokens,
            found=evidence.gone,
            rule=self.rule,
            factor=self.factor,
            log=self.log,
        )

    @property
    def threshold(self) -> str:
        return f"factor={self.factor}"
