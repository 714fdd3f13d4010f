"""Public packages that stand beside the project's own code, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = ("nystrom-attention",)
SAMPLERS = ("torch-quickfps", "torch-fps")

Sampler = Callable[[Tensor, int], Tensor]


def installed(name: str) -> bool:
    """Whether a package of the extra `bench` is there."""
    return find_spec(name.replace("-", "_")) is not None


def nystrom_attention(qkv: tuple[Tensor, Tensor, Tensor], landmarks: int) -> Callable[[], Tensor]:
    """The attention of `nystrom-attention` (lucidrains) on the same queries, keys and values.

    Its projections become identities and its trained convolution is switched off, so that what
    is left is padding, segment means, three softmaxes, six iterations and the products.

    Args:
        qkv: three of `[b h n d]`.
        landmarks: its number of segments.
    """
    package: Any = importlib.import_module("nystrom_attention")
    _, heads, _, dim = qkv[0].shape
    module = package.NystromAttention(
        dim=heads * dim, dim_head=dim, heads=heads, num_landmarks=landmarks, residual=False
    )
    module.to_qkv = module.to_out = nn.Identity()
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], dim=-1)
    module = module.eval().to(joined)
    return lambda: module(joined)


def sampler(name: str) -> Sampler:
    """A public sampler of farthest points: (points `[b n c]`, number) -> long `[b m]`.

    Both begin with token 0.
    """
    package: Any = importlib.import_module(name.replace("-", "_"))
    if name == "torch-quickfps":
        return lambda points, num: package.sample_idx(points, num, start_idx=0)

    def sample(points: Tensor, num: int) -> Tensor:
        every = points.new_ones(points.shape[:2], dtype=torch.bool)
        return package.farthest_point_sampling(points, every, num, random_start=False)

    return sample
