"""Exact attention: the reference of every variant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_float, check_qkv, check_same_device, default_scale


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, keep: Tensor | None = None
) -> Tensor:
    """Exact attention, softmax(scale q k') v.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        scale: factor of the logits; None = d^-1/2.
        keep: True = may attend; `[b m n]`, `[b 1 m n]` or `[b 1 1 n]`. A row that may attend to
            nothing gives zeros.

    Returns:
        `[b h m d]`.

    Raises:
        TypeError: an argument is not a tensor, or `keep` is not boolean.
        ValueError: shapes do not fit.

    Source: Vaswani et al. 2017, equation 1.
    """
    check_qkv(q, k, v)
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if keep.dtype != torch.bool:
        raise TypeError(f"Expected keep to be a bool tensor, got {keep.dtype}.")
    if keep.ndim == 3:
        keep = keep[:, None]
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if keep.ndim != 4 or any(a not in (1, b) for a, b in zip(keep.shape, shape, strict=True)):
        raise ValueError(
            f"Expected keep to broadcast to [b h m n] = {shape}, got {tuple(keep.shape)}."
        )
    check_same_device(q=q, keep=keep)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
    # The kernels disagree on rows without a key: some give NaN.
    return out.masked_fill(~keep.any(-1, keepdim=True), 0)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fused attention, and the log of the sum that each row is divided by, where the kernel says.

    The kernel for CPUs keeps that number for its backward pass. There is none where another kernel
    runs, where a gradient is asked for (that of the number is unknown), and under `torch.compile`,
    which cannot ask what is switched on.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        scale: factor of the logits.
        mask: added to the logits, or bool with True = may attend, broadcastable to `[b h m n]`.
            A row that may attend to nothing has no meaning.

    Returns:
        `[b h m d]`, and logsumexp(scale q k' + mask) `[b h m]` or None.
    """
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    told = (
        kernel is not None
        and not torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and torch.backends.cuda.flash_sdp_enabled()  # the switch of all devices
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
        and not v.requires_grad
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and (mask is None or (mask.ndim in (2, 4) and not mask.requires_grad))
    )
    if not told or kernel is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    return kernel(q, k, v, attn_mask=as_bias(mask, q.dtype), scale=scale)


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of any kind as what is added to the logits.

    Args:
        mask: bool with True = may attend, a float bias, or None.
        dtype: of the bias that a bool mask becomes.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def attention_pattern(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """The attention weights themselves, softmax(scale q k' + bias), for analysis: O(n^2).

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        scale: factor of the logits; None = d^-1/2.
        bias: added to the logits, or bool with True = may attend; broadcastable to `[b h m n]`.

    Returns:
        `[b h m n]` in at least float32; rows sum to 1.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: an argument is not `[b h n d]`.
    """
    check_float("q", q, 4, "[b h n d]")
    check_float("k", k, 4, "[b h n d]")
    scores = attention_logits(q, k, default_scale(q) if scale is None else scale)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    return scores.softmax(-1)


def attention_logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """scale q k' + bias in at least float32, whatever autocast says.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        scale: factor.
        bias: broadcastable to `[b h m n]`; None = nothing.

    Returns:
        `[b h m n]`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    with full_precision(q):
        if bias is None:
            return scale * (q @ k.mT)
        size = (*q.shape[:2], *bias.shape[2:])
        parts = (bias.to(wide).expand(size), q, k.mT)
        found = torch.baddbmm(*(part.flatten(0, 1) for part in parts), alpha=scale)
    return found.unflatten(0, q.shape[:2])


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off where it is on."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
