"""Massive tokens: along the direction that the weights of the blocks push most."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fna_lab import ops
from fna_lab.hosts import given
from fna_lab.mask.detector.base import Detector, Evidence, check_positive
from fna_lab.settings import check_integer


class SingularDefectDetector(Detector):
    """Patch tokens whose |cos| with the blocks' singular defect stands out of the picture.

    Each block before detection is replaced by the linear map that fits it best over Gaussian
    inputs; the direction is the first left singular vector of the product of these maps. Only the
    weights are read: no picture is seen. The published form writes attention in closed form and
    fits the MLP; here the whole block runs on sequences of one token, over which attention is the
    projection of the token's own value, so that any host is fitted alike.

    What it can tell, in either form, is the direction that the weights push an average input
    along. It does not know whom a head attends to, nor what an MLP does only beyond a threshold.
    On the constructed `backbone=planted` it finds the truth exactly in the input of blocks 3 and
    4, behind the MLP that makes massive tokens. From block 5 on the weights push hardest along a
    channel of CLS alone, so that artifacts, which act on that channel too, are found as well; with
    those heads left out, the channel of artifacts comes first, for the MLPs take small values of
    the massive channel back and let large ones be, which on average shrinks it. So `detect` should
    lie where massive tokens are born.

    Args:
        stds: threshold, in standard deviations of the picture's |cos| above its mean. Of n
            patch tokens none can lie beyond (n - 1) / sqrt(n), so that 4 need at least 18.
        samples: Gaussian inputs a block; None = 8 times the channels (published: 100,000).
        seed: of the inputs.

    Raises:
        ValueError: a setting is out of range.

    Source: Wang et al. 2024, "SINDER: Repairing the Singular Defects of DINOv2".
    """

    def __init__(self, *, stds: float = 4.0, samples: int | None = None, seed: int = 0) -> None:
        check_positive("stds", stds)
        check_integer("mask.detector.samples", samples, least=2, optional=True)
        check_integer("mask.detector.seed", seed, least=0)
        self.stds = stds
        self.samples = samples
        self.seed = seed

    def prepare(self, blocks: Sequence[nn.Module], detect: int) -> Tensor:
        """The direction `[c]`, in double precision.

        Raises:
            ValueError: no block runs before detection, or there are too few samples.
            NotImplementedError: a block does not run on a sequence of one token.
        """
        if detect < 1:
            raise ValueError(
                f"mask.detect={detect}: singular_defect reads the weights of the blocks before "
                "detection; expected block 1 or a later one."
            )
        generator = torch.Generator().manual_seed(self.seed)
        channels = _channels(blocks[0])
        samples = 8 * channels if self.samples is None else self.samples
        if samples <= channels:
            raise ValueError(
                f"mask.detector.samples={samples}: expected more than the {channels} channels."
            )
        maps = []
        for layer, block in enumerate(blocks[:detect]):
            like = next(block.parameters())
            size = (samples, channels)
            x = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(like)
            maps.append(ops.linear_map(x, _one_token(block, layer, x)))
        return ops.defect_direction(maps)

    def __call__(self, evidence: Evidence) -> Tensor:
        """T, bool `[b n]`."""
        return self.scores(evidence) > self.stds

    def scores(self, evidence: Evidence) -> Tensor:
        """|cos| with the direction, in deviations above the picture's mean: `[b n]`.

        Raises:
            ValueError: the evidence holds no direction.
        """
        if not isinstance(evidence.prepared, Tensor):
            raise ValueError("Expected evidence with what `prepare` returned, got none.")
        candidates = evidence.candidates()
        cosines = ops.alignment(evidence.x, evidence.prepared)
        return ops.standard_scores(cosines, candidates).masked_fill(~candidates, -torch.inf)

    @property
    def threshold(self) -> str:
        return f"stds={self.stds}"


def _channels(block: nn.Module) -> int:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features  # the first of a block reads the tokens themselves
    raise NotImplementedError(f"{type(block).__name__} has no linear layer.")


@torch.no_grad()
def _one_token(block: nn.Module, layer: int, x: Tensor) -> Tensor:
    """Inputs `[s c]`, each a sequence of its own, through a block."""
    # `forward` and not a call: hooks on the block belong to patches that see pictures.
    more = {
        name: None
        for name, one in list(inspect.signature(block.forward).parameters.items())[1:]
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    reasons = []
    for side in (1, 0):  # hosts keep tokens second or first
        try:
            out = block.forward(x.unsqueeze(side), **more)
            out = given(out).squeeze(side)
            alone = block.forward(x[:2].unsqueeze(side), **more)
            alone = given(alone).squeeze(side)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            reasons.append(str(error).split("\n")[0])
            continue
        if out.shape == x.shape and torch.allclose(out[:2], alone, rtol=1e-2, atol=1e-3):
            return out
        reasons.append("its tokens see each other")
    raise NotImplementedError(
        f"mask/detector=singular_defect runs each block on sequences of one token, and block "
        f"{layer} ({type(block).__name__}) does not: {reasons[0]}."
    )
