"""The one place where attention is replaced.

Every modern ViT calls `torch.nn.functional.scaled_dot_product_attention` once a block, after its
own projections, q/k norms and rotary embedding. While a block runs, a `TorchFunctionMode` hands
that call to the plan. Entering and leaving it from hooks of the blocks, and not of the model,
catches every way into the model (`forward_features`, `encode_image`, ...) and leaves attention
outside the blocks (pooling heads, text towers) alone.

Joint blocks (Stable Diffusion 3's) attend over the tokens of a picture and, behind them, those of
a text. That call is the one that is replaced; the second one that some of them make, over the
picture alone (`attn2` of Stable Diffusion 3.5), stays the host's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fna_lab.hosts import hidden, text_of

Attend = Callable[..., Tensor]
# Queries, keys, mask and scale of one attention call.
Call = tuple[Tensor, Tensor, Tensor | None, float]
# New positional and keyword arguments of a block; None = they stay.
Changed = tuple[tuple[Any, ...], dict[str, Any]] | None


class Probed(Exception):  # noqa: N818 (no error: it leaves a block early)
    """Leaves a block at its attention.

    Attributes:
        call: queries, keys, mask and scale of that attention.
    """

    def __init__(self, *call: Any) -> None:
        super().__init__()
        self.call: Call = call  # type: ignore[assignment]


class Switch(Protocol):
    """What can be switched off for a while, and knows which block is running."""

    enabled: bool
    running: EnterSeam | None

    def left(self) -> None: ...


class AttentionSeam(TorchFunctionMode):
    """Hands each fused-attention call to `attend` and counts it.

    Args:
        attend: called with q, k, v `[b h n d]` and the keywords `attn_mask`, `scale` and
            `is_causal`.
        where: the block's name, for messages.
        after: changes what `nn.MultiheadAttention` projects, `[b n c]`; None = nothing does. The
            projection of other hosts is a module, and takes a hook.

    Attributes:
        calls: how often the block asked for the attention that is replaced.
        joint: in a joint block, over how many tokens that is; None in others: every call is.
    """

    def __init__(
        self, attend: Attend, where: str, after: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.attend = attend
        self.where = where
        self.after = after
        self.calls = 0
        self.joint: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ARG002 (the protocol's signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Intercept fused attention; everything else runs as it is."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._replace(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            out, none = _multi_head(self._replace, self.where, *args, **kwargs)
            turned = out.transpose(0, 1)
            return out if self.after is None else self.after(turned).transpose(0, 1), none
        return func(*args, **kwargs)

    def _replace(self, *args: Any, **kwargs: Any) -> Tensor:
        call = _Call(*args, **kwargs)
        if self.joint is not None and call.query.shape[-2] != self.joint:
            return F.scaled_dot_product_attention(*args, **kwargs)
        self.calls += 1
        call.check(self.where)
        # The variant's own attention calls must reach the kernels, past outer seams too.
        with torch._C.DisableTorchFunction():
            return self.attend(
                call.query,
                call.key,
                call.value,
                attn_mask=call.attn_mask,
                scale=call.scale,
                is_causal=call.is_causal,
            )


class _Call:
    """One call of `scaled_dot_product_attention`, with its arguments by name."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.query = query
        self.key = key
        self.value = value
        if enable_gqa and query.ndim == 4:
            groups = query.shape[1] // key.shape[1]
            self.key = key.repeat_interleave(groups, dim=1)
            self.value = value.repeat_interleave(groups, dim=1)
        self.attn_mask = attn_mask
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale

    def check(self, where: str) -> None:
        if self.query.ndim != 4:
            raise NotImplementedError(
                f"Block {where} attends with {self.query.ndim}-D tensors "
                f"{tuple(self.query.shape)}; expected [batch heads tokens head_dim]. "
                "Windowed hosts such as SAM are not supported."
            )
        if self.query.shape != self.key.shape:
            raise NotImplementedError(
                f"Block {where} attends from {self.query.shape[2]} to {self.key.shape[2]} tokens; "
                "expected self-attention over one set of tokens."
            )
        if self.dropout_p:
            raise ValueError(
                f"Block {where} drops attention weights (dropout_p={self.dropout_p}); "
                "call model.eval() first."
            )


def _multi_head(
    attend: Attend,
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001 (the signature of torch)
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention` around `attend`.

    The fused call lies inside `F.multi_head_attention_forward`, where the mode is off, and
    entering it there again recurses; so the two projections around it are done here.
    """
    plain = query is key and key is value and in_proj_weight is not None
    if not plain or use_separate_proj_weight or bias_k is not None or bias_v is not None:
        raise NotImplementedError(f"Block {where}: expected nn.MultiheadAttention on one input.")
    if need_weights or add_zero_attn or key_padding_mask is not None or rest.get("is_causal"):
        raise NotImplementedError(
            f"Block {where}: nn.MultiheadAttention is asked for weights, a zero key, a padding "
            "mask or causality; expected plain self-attention with need_weights=False."
        )
    assert in_proj_weight is not None  # `plain` says so
    packed = F.linear(query, in_proj_weight, in_proj_bias)  # [n b 3*c]
    packed = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)  # [3 b h n d]
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    q, k, v = packed.contiguous()
    out = attend(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p if training else 0.0)
    out = out.permute(2, 0, 1, 3).flatten(2)  # [n b c]
    return F.linear(out, out_proj_weight, out_proj_bias), None


class EnterSeam:
    """Forward pre-hook of one block: enters the seam, if no later patch takes the block.

    Args:
        seam: the seam of this block.
        before: called with the block's positional and keyword arguments; may return others.
        patch: the patch that this belongs to.
    """

    def __init__(
        self, seam: AttentionSeam, before: Callable[[tuple, dict], Changed], patch: Switch
    ) -> None:
        self.seam = seam
        self.before = before
        self.patch = patch

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        claims = [
            hook
            for hook in block._forward_pre_hooks.values()
            if isinstance(hook, EnterSeam) and hook.patch.enabled
        ]
        if not claims or claims[-1] is not self:
            return None
        if self.patch.running is not None:  # an interruption (Ctrl-C) calls no forward hooks
            self.patch.running.leave()
        changed = self.before(args, kwargs)
        text = text_of(block, args, kwargs)
        if text is not None:
            self.seam.joint = hidden(args, kwargs, self.seam.where).shape[1] + text.shape[1]
        self.seam.calls = 0
        self.patch.running = self
        self.seam.__enter__()
        return changed

    def leave(self) -> None:
        """Leave the seam again."""
        self.patch.left()
        self.seam.__exit__(None, None, None)


class LeaveSeam:
    """Forward hook of one block, called even on errors: leaves the seam and checks it."""

    def __init__(self, enter: EnterSeam) -> None:
        self.enter = enter

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self.enter.patch.running is not self.enter:
            return
        self.enter.leave()
        seam = self.enter.seam
        if output is None:  # the block raised; its own error is on the way
            return
        if seam.calls != 1:
            raise RuntimeError(
                f"Block {seam.where} ({type(block).__name__}) called fused attention "
                f"{seam.calls} times where fna_lab expects one call a block, so its attention "
                "cannot be replaced. "
                + (
                    "Hosts with several attentions in a block are not supported."
                    if seam.calls
                    else "Does the host use its own attention kernel? timm needs fused attention "
                    'switched on (TIMM_FUSED_ATTN), transformers attn_implementation="sdpa"; '
                    "Swin-like hosts write attention out and are not supported."
                )
            )


def recompile() -> None:
    """Forget what `torch.compile` has made: its graphs do not ask which hooks a block has."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
