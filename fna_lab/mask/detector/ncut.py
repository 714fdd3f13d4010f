"""Artifacts: far along an eigenvector of a normalised cut of the picture's tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.mask.detector.base import Detector, Evidence, check_positive


class NcutDetector(Detector):
    """Patch tokens whose entry of one eigenvector exceeds so many root mean squares.

    The published form cuts all tokens of 50 pictures at once, CLS too, after block 15 of CLIP
    ViT-L/14, and takes entries above 0.015: 1.70 root mean squares over 12,850 tokens, see
    `ops.normalized_cut`. Here each picture is cut on its own, so that it does not depend on its
    batch mates; or its tokens are placed on the cut of a reference, tokens of many pictures that
    were cut once, which is closer to what was published. Prefix tokens take no part. Which
    eigenvector was used is not known.

    Massive tokens, and other groups without any affinity to the rest, have value 1 as the
    constant has: which of them the first eigenvector shows is then chance. So massive tokens are
    left out of the cut. The rule always finds something, be it rare content alone, unless `value`
    asks for a group that stands apart.

    Args:
        component: which eigenvector, 1 = the first after the constant. Its sign makes the smaller
            group positive.
        threshold: in root mean squares of the eigenvector over the tokens that were cut.
        massive: tokens of a norm above so many medians are left out; None = all take part.
        value: least eigenvalue of the component, 0 to 1; below it no token is found.
        samples: most tokens that stand for all others (Nystroem); None = exact.
        reference: a `.npy` file of patch tokens `[m c]` at the detection block, or an `.npz` file
            with the array `tokens`, such as the `arrays.npz` of a run of `task=anatomy` with
            `task.measure=[topology]`, `task.topology.tokens=true` and `task.topology.places` set
            to that block; None = each picture's own cut.

    Raises:
        ValueError: a setting is out of range, or the file holds no tokens.

    Source: the projection heuristic of Fast Nystroem Attention's companion study.
    """

    finds = "artifact"

    def __init__(
        self,
        *,
        component: int = 1,
        threshold: float = 1.7,
        massive: float | None = 3.0,
        value: float = 0.0,
        samples: int | None = 512,
        reference: str | None = None,
    ) -> None:
        if type(component) is not int or component < 1:
            raise ValueError(f"mask.detector.component={component!r}: expected an integer >= 1.")
        check_positive("threshold", threshold)
        if massive is not None:
            check_positive("massive", massive)
        check_positive("value", value, zero=True)
        if value > 1:
            raise ValueError(f"mask.detector.value={value!r}: expected a number from 0 to 1.")
        if samples is not None and (type(samples) is not int or samples <= component):
            raise ValueError(
                f"mask.detector.samples={samples!r}: expected an integer above "
                f"component={component}, or null."
            )
        self.component = component
        self.limit = threshold
        self.massive = massive
        self.value = value
        self.samples = samples
        self.reference = None if reference is None else self._read(reference)

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return self.scores(evidence) > self.limit

    def scores(self, evidence: Evidence) -> Tensor:
        """Entries of the eigenvector in its root mean squares, 0 for massive tokens: `[b n]`.

        Raises:
            ValueError: the host has too few tokens, or other channels than the reference.
        """
        x, candidates = evidence.x, evidence.candidates()
        allowed = self._ordinary(x, candidates)
        if self.reference is not None:
            tokens, bandwidth, cut = self.reference
            if tokens.shape[2] != x.shape[2]:
                raise ValueError(
                    f"mask.detector.reference has {tokens.shape[2]} channels, and the host's "
                    f"tokens have {x.shape[2]}."
                )
            entries = ops.extend_cut(x, cut, tokens, bandwidth)[..., self.component]
            count, values = cut.vectors.shape[1], cut.values.to(x.device)
        else:
            if x.shape[1] <= self.component:
                raise ValueError(
                    f"mask.detector.component={self.component}: the host has {x.shape[1]} tokens; "
                    "expected more tokens than that."
                )
            cut = self._cut(x, allowed)
            entries, values = cut.vectors[..., self.component], cut.values
            count = allowed.sum(1, keepdim=True)
        apart = values[:, self.component, None] >= self.value
        entries = (entries * count**0.5).masked_fill(~(allowed & apart), 0.0)
        kind = torch.promote_types(x.dtype, torch.float32)
        return entries.to(kind).masked_fill(~candidates, -torch.inf)

    def _ordinary(self, x: Tensor, candidates: Tensor) -> Tensor:
        """Candidates that are not massive, bool `[b n]`."""
        if self.massive is None:
            return candidates
        norms = x.float().norm(dim=2)
        return candidates & (norms <= self.massive * ops.medians(norms, candidates))

    def _cut(self, x: Tensor, allowed: Tensor) -> ops.Cut:
        return ops.normalized_cut(x, self.component + 1, samples=self.samples, allowed=allowed)

    def _read(self, path: str) -> tuple[Tensor, Tensor, ops.Cut]:
        """Tokens `[1 m c]` without massive ones, their bandwidth, and their cut."""
        try:
            found = np.load(Path(path))
            values = found if isinstance(found, np.ndarray) else found["tokens"]
            tokens = torch.as_tensor(values, dtype=torch.float32)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"mask.detector.reference={path!r}: expected a .npy file of tokens, or an .npz "
                f"file with the array tokens ({error})."
            ) from error
        if tokens.ndim != 2 or len(tokens) <= self.component or not torch.isfinite(tokens).all():
            raise ValueError(
                f"mask.detector.reference={path!r}: expected finite tokens [m c], more than "
                f"component={self.component}, got shape {tuple(tokens.shape)}."
            )
        tokens = tokens[None]
        every = torch.ones(tokens.shape[:2], dtype=torch.bool)
        tokens = tokens[:, self._ordinary(tokens, every)[0]]
        bandwidth = ops.rbf_bandwidth(tokens)
        return tokens, bandwidth, self._cut(tokens, torch.ones_like(tokens[..., 0]).bool())

    @property
    def threshold(self) -> str:
        return f"threshold={self.limit}"
