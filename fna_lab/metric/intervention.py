"""Attention with given tokens taken out, and what becomes of norms and sinks under it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant, Context, Removal, attend_without
from fna_lab.metric.mass import attention_sums

# The branches of the round-by-round study: stage and pattern; `mask` takes pairs of type 1.
BRANCHES = {
    "mask": ("mask", "type1"),
    "type1": ("sink", "type1"),
    "type2": ("sink", "type2"),
}


class Onlooker(AttentionVariant):
    """Exact attention that asks which tokens are massive and which are artifacts."""

    token_classes = ("massive", "artifact")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        bias = context.attn_mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=context.scale)


class WithoutTokens(AttentionVariant):
    """Exact attention without tokens that are given, instead of found.

    Args:
        tokens: bool `[b n]`.
        stage: before softmax or after it.
        pattern: `type1` or `type2`.
    """

    def __init__(self, tokens: Tensor, stage: str, pattern: str) -> None:
        self.removal = Removal(tokens, pattern, stage, *ops.token_rows(tokens))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend: `[b h n d]` x3 -> `[b h n d]`."""
        return attend_without(self.removal, q, k, v, context)

    def look(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """How much each token draws under the removal.

        Returns:
            Share of all attention `[b n]`, and how far each token is a sink `[b n]`: above 1 it
            is one. With CLS: a[CLS, t] / a[CLS, CLS]; without: the incoming attention of
            others against nine uniform shares of the tokens that are left. Prefix tokens and
            removed ones are -inf.
        """
        context = replace(context, removal=self.removal)
        everyone = torch.ones_like(self.removal.tokens)[..., None]
        sums = attention_sums(q, k, context, everyone)
        drawn = sums.incoming.mean(1)
        if context.has_cls:
            row = sums.first.mean(1)
            score = row / row[:, :1]
        else:
            gone, stage, prefix = (
                self.removal.tokens,
                self.removal.stage,
                context.num_prefix_tokens,
            )
            share = ops.incoming_share(
                q, k, prefix=prefix, scale=context.scale, bias=context.attn_mask, found=gone,
                stage=stage, kept=context.kept,
            )  # fmt: skip
            if context.kept is not None:
                gone = gone | ~context.kept
            _, shares = ops.incoming_sinks(share, prefix=prefix, found=gone)
            score = shares / ops.INCOMING_RULES["raw"]
        taken = self.removal.tokens.clone()
        if context.kept is not None:
            taken |= ~context.kept
        taken[:, : context.num_prefix_tokens] = True
        return drawn, score.masked_fill(taken, -torch.inf)


def next_sink(score: Tensor) -> Tensor:
    """The strongest sink of each picture that has one: scores `[b n]` -> bool `[b n]`."""
    best = score.argmax(1, keepdim=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, score.gather(1, best) > 1)


def round_facts(
    drawn: Tensor,
    score: Tensor,
    x: Tensor,
    removed: Tensor,
    num_prefix_tokens: int,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """What one round shows of sinks and norms.

    Args:
        drawn: share of all attention that each token draws `[b n]`.
        score: see `WithoutTokens.look`.
        x: hidden states at the detection block `[b n c]`.
        removed: tokens that are taken out, bool `[b n]`.
        num_prefix_tokens: CLS and registers before the patch tokens.
        kept: tokens that are no padding, bool `[b n]`; None = all.

    Returns:
        Each `[b]`. `top_sink`: share of all attention that the strongest patch token draws.
        `sinks`: tokens with a score over 1. `norm_removed`: mean norm of the removed tokens, in
        medians of all patch tokens, NaN without any. `norm_largest`: of the patch tokens left.
    """
    norms = ops.patch_norms(x, num_prefix_tokens)
    norms = norms / ops.medians(norms, kept)
    if kept is not None:
        norms = norms * ops.patches_of(kept, norms)
    gone = removed[:, num_prefix_tokens:]
    return {
        "top_sink": drawn.masked_fill(~torch.isfinite(score), 0).amax(1),
        "sinks": (score > 1).sum(1).to(drawn.dtype),
        "norm_removed": ops.class_mean(norms, gone[..., None])[:, 0],
        "norm_largest": norms.masked_fill(gone, 0).amax(1),
    }
