"""When kernels stand in for the torch operations, and how to switch them off.

The torch path is always there, and takes everything else. Kernels are used where no gradient is
asked for, and a mask is alike for all queries: which keys may be attended to, or a bias of each
key, as the sizes of clusters are (`chain_products`). The environment variables are read at every
call; a graph of `torch.compile` keeps the path that it was traced with.

Triton (`use_kernels`), unless `FNA_LAB_TRITON=0`:

- the tensors lie on an NVIDIA GPU of compute capability 8.0 (Ampere) or later, or on the CPU with
  Triton's interpreter on (`TRITON_INTERPRET=1`, for tests: it is slow);
- Triton can be imported (PyTorch for CUDA brings it along on Linux).

Equality with the torch path is tested under the interpreter, and that the kernels compile for
Ampere and Hopper. Their speed on a GPU has not been measured.

C++ (`on_cpu`), unless `FNA_LAB_CPP=0`:

- the tensors are float32 on an x86 processor with AVX2 or AVX-512, under Linux, without autocast;
- pictures have at least `LEAST_TOKENS` tokens: for fewer nobody has to wait for a compiler;
- g++ is installed, or what `CXX` names; see `compiled`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Triton for other vendors exists; block sizes here were chosen and checked for NVIDIA alone.
INSTALLED = importlib.util.find_spec("triton") is not None and torch.version.hip is None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS = 128
LEAST_TOKENS = 512


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


def on_cpu(tokens: int, *tensors: Tensor) -> bool:
    """Whether these tensors go to a compiled kernel of the processor; see the head of this file.

    Args:
        tokens: of a picture.
        tensors: what the operation reads.
    """
    if tokens < LEAST_TOKENS or os.environ.get("FNA_LAB_CPP") == "0":
        return False
    asked = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float32 or asked and x.requires_grad:
            return False
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return False  # tangents would get lost
    # What is exported has to run elsewhere; torch before 2.7 does not tell it from a compiled one.
    exported = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    compiler = torch.compiler
    exported = exported or getattr(compiler, "is_exporting", compiler.is_compiling)()
    return not exported and not torch.is_autocast_enabled("cpu") and _is_compiled()


@torch.compiler.assume_constant_result  # no graph can run a compiler
def _is_compiled() -> bool:
    if sys.platform != "linux":
        return False
    from fna_lab.ops.kernels import compiled

    return compiled.available()


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

    Kernels take masks that are alike for all queries: which keys are left out, or a bias of each
    key; those in C++ float32 alone, those in Triton float16, bfloat16 and float32 of one kind, a
    bias of any of them, and head dims up to 128. With a mask that differs from query to query
    torch does it, and under autocast with float32, which it then casts.

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
    masks = [mask for mask in (rows, columns) if mask is not None]
    if not all(_is_of_keys(mask) for mask in masks):
        return plain
    biases = [mask for mask in masks if mask.dtype != torch.bool]
    some = q_marks.shape[2] > 0 and k_marks.shape[2] > 0
    if some and on_cpu(k.shape[2], q, k, v, q_marks, k_marks, *biases):
        from fna_lab.ops.kernels import compiled

        return compiled.attend_few, compiled.attend_to_few
    if max(q.shape[3], v.shape[3]) > MOST_CHANNELS:
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
