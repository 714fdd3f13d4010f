"""Random numbers that depend on sizes and a seed alone."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def drawn_once(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a few integers that keeps what it drew for later calls: read it only.

    What a first call runs under (inference mode, vmap, a trace with fake tensors, another default
    dtype) would cling to the draw of all later ones. A thread of its own is under most of it, and
    the draw itself names its dtype and device.
    """

    @functools.lru_cache(maxsize=16)  # the same few at every layer
    def kept(*given: int) -> Tensor:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(draw, *given).result()

    @torch.compiler.assume_constant_result  # a traced graph may not make a generator of its own
    def constant(*given: int) -> Tensor:
        return kept(*given)

    @functools.wraps(draw)
    def drawn(*given: int) -> Tensor:
        return constant(*[operator.index(number) for number in given])  # a graph for each size

    return drawn


def uniform_numbers(num: int, seed: int) -> Tensor:
    """Numbers from 0 to 1, the same at every call: `[num]` in float32 on the CPU."""
    return _uniform(num, seed).clone()


@drawn_once
def _uniform(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, generator=generator, dtype=torch.float32, device="cpu")
