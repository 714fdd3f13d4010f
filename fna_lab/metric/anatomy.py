"""What stands out among the tokens of a block: norms, sinks, and where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import Context


def attention_pattern(q: Tensor, k: Tensor, context: Context) -> Tensor:
    """The exact attention of a block under the host's bias and the mask strategy.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        context: of the block.

    Returns:
        `[b h n n]` in at least float32; rows sum to 1, or less after a `sink` stage.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = context.scale * (q.to(wide) @ k.to(wide).mT)
    bias, removal = context.attn_mask, context.removal
    if bias is not None:
        keep = bias if bias.dtype == torch.bool else None
        scores = scores + bias if keep is None else scores.masked_fill(~keep, -torch.inf)
    if removal is None:
        return scores.softmax(-1)
    gone = ops.removed_pairs(removal.tokens, removal.pattern)[:, None]
    if removal.stage == "mask":
        return scores.masked_fill(gone, -torch.inf).softmax(-1).nan_to_num(0.0)
    return scores.softmax(-1).masked_fill(gone, 0.0)


def token_facts(
    q: Tensor, k: Tensor, context: Context, objects: Tensor | None = None
) -> dict[str, Tensor]:
    """Facts of the tokens of one block, picture by picture.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        context: of the block; its input is `context.x` `[b n c]`.
        objects: share of each patch that objects cover `[b p]`, None where unknown.

    Returns:
        Each `[b]`. `largest_norm`: of a patch token, in medians. `massive_norm_ratio` (3) and
        `massive_norm_gap` (0.5): tokens found. `top_incoming`: the largest share of all
        attention that one patch token draws, in uniform shares. `top_norm`: that token's norm, in
        medians. `top_on_background`: whether no object covers it. Where there is a CLS:
        `massive_cls_proxy` (0.3), `sinks_cls_proxy` (1.0), `cls_to_itself`: the weight.
    """
    prefix, x = context.num_prefix_tokens, context.x
    norms = x[:, prefix:].float().norm(dim=-1)
    norms = norms / norms.median(dim=1, keepdim=True).values
    pattern = attention_pattern(q, k, context)
    incoming = ops.incoming(pattern)[:, prefix:]
    share, top = incoming.max(dim=1)
    facts = {
        "largest_norm": norms.amax(1),
        "massive_norm_ratio": ops.norm_ratio(x, prefix=prefix, ratio=3.0).sum(1),
        "massive_norm_gap": ops.norm_gap(x, prefix=prefix, per_picture=True, min_gap=0.5).sum(1),
        "top_incoming": share * pattern.shape[-1],
        "top_norm": norms.gather(1, top[:, None])[:, 0],
    }
    if objects is not None:
        facts["top_on_background"] = objects.gather(1, top[:, None])[:, 0] == 0
    if context.has_cls:
        known = torch.arange(x.shape[1], device=x.device) < prefix
        known = known.expand(x.shape[0], -1)
        for name, ratio in (("massive_cls_proxy", 0.3), ("sinks_cls_proxy", 1.0)):
            facts[name] = ops.cls_proxy(pattern[:, :, :1], ratio=ratio, found=known).sum(1)
        facts["cls_to_itself"] = pattern[:, :, 0, 0].mean(1)
    return {name: value.double() for name, value in facts.items()}
