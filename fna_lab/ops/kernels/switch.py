"""When Triton kernels stand in for the torch operations, and how to switch them off.

They are used where all of this holds; everything else takes the torch path, which is always there:

- the tensors lie on an NVIDIA GPU of compute capability 8.0 (Ampere) or later, or on the CPU with
  Triton's interpreter on (`TRITON_INTERPRET=1`, for tests: it is slow);
- Triton can be imported (PyTorch for CUDA brings it along on Linux);
- no gradient is asked for;
- a mask is alike for all queries: which keys may be attended to, or a bias of each key, as the
  sizes of clusters are (`chain_products`);
- the environment variable `FNA_LAB_TRITON` is not `0`. It is read at every call (a graph of
  `torch.compile` keeps the path that it was traced with).

Equality with the torch path is tested under the interpreter, and that the kernels compile for
Ampere and Hopper. Their speed on a GPU has not been measured.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Triton for other vendors exists; block sizes here were chosen and checked for NVIDIA alone.
INSTALLED = importlib.util.find_spec("triton") is not None and torch.version.hip is None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS = 128


def use_kernels(*tensors: Tensor) -> bool:
    """Whether these tensors go to a Triton kernel; see the head of this file.

    Args:
        tensors: what the operation reads, on one device.
    """
    if not INSTALLED or os.environ.get("FNA_LAB_TRITON") == "0":
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    device = tensors[0].device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def chain_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    *,
    rows: Tensor | None,
    columns: Tensor | None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What takes softmax(s Qp K') V and softmax(s Q Kp') V' of the Nystroem chain.

    The kernels take head dims up to 128, float16, bfloat16 and float32 of one kind, and masks that
    are alike for all queries: which keys are left out, or a bias of each key, of any of these
    kinds. With a mask that differs from query to query torch does it, and under autocast with
    float32, which it then casts.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        q_marks: landmark queries `[b h m d]`.
        k_marks: landmark keys `[b h m d]`.
        rows: `attn_mask` of landmark queries x keys, broadcastable to `[b h r n]`.
        columns: `attn_mask` of queries x landmark keys, broadcastable to `[b h n m]`.

    Returns:
        Two functions that are called as `scaled_dot_product_attention` is, with `attn_mask` and
        `scale`; that function itself, twice, where the kernels cannot serve.
    """
    plain = F.scaled_dot_product_attention, F.scaled_dot_product_attention
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in (k, v, q_marks, k_marks)):
        return plain
    if max(q.shape[3], v.shape[3]) > MOST_CHANNELS:
        return plain
    masks = [mask for mask in (rows, columns) if mask is not None]
    if not all(_is_of_keys(mask) for mask in masks):
        return plain
    if not use_kernels(q, k, v, q_marks, k_marks, *masks):
        return plain
    if q.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type):
        return plain
    from fna_lab.ops.kernels.nystrom import attend_few, attend_to_few

    return attend_few, attend_to_few


def _is_of_keys(mask: Tensor) -> bool:
    """Whether an `attn_mask` is `[b h 1 n]`, or 1 in place of b and h, bool or floating."""
    return mask.dtype in (torch.bool, *DTYPES) and mask.ndim == 4 and mask.shape[2] == 1
