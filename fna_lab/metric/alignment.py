"""How tokens push each other: suppression, and the directions of queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab import ops
from fna_lab.metric.mass import Sums, by_class


def directions(x: Tensor, out_weight: Tensor, heads: int) -> Tensor:
    """The tokens' own directions as the values of each head see them: `[b h n d]`.

    The suppression matrix is their product with the values.

    Args:
        x: a block's input `[b n c]`.
        out_weight: weight of the output projection `[c h*d]`.
        heads: h.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return torch.einsum("bnc,hcd->bhnd", unit, ops.per_head(out_weight.float(), heads))


def suppression_facts(
    x: Tensor, v: Tensor, out_weight: Tensor, members: Tensor, sums: Sums
) -> dict[str, Tensor]:
    """How far each class pushes each class along its own direction; negative = shrinks.

    Args:
        x: a block's input `[b n c]`.
        v: values `[b h n d]`.
        out_weight: weight of the output projection `[c h*d]`.
        members: bool `[b n k]`.
        sums: with `pushed`.

    Returns:
        `suppression/<class>` `[b]`: the whole push that a token of the class receives from
        attention, in the host's own units. `suppression` `[b h k k]` (pushed, pushing): mean over
        pairs, without attention weights. `suppression_weighted` `[b h k k]`: sum over the pushing
        class with attention weights, mean over the pushed one.

    Source: the suppression matrix of Fast Nystroem Attention's companion study.
    """
    assert sums.pushed is not None, "attention_sums was not given the values"
    count = members.sum(1).to(sums.pushed.dtype)
    present = (count > 0)[:, None]
    weighted = sums.pushed / count[:, None, :, None]
    # A class without tokens pushes nobody and is pushed by nobody: absent, and not zero.
    weighted = weighted.where(present[..., None] & present[..., None, :], torch.nan)
    received = weighted.nan_to_num(0.0).sum((1, 3)).where(count > 0, torch.nan)
    return by_class("suppression", received) | {
        "suppression": ops.class_suppression(x.float(), v.float(), out_weight.float(), members),
        "suppression_weighted": weighted,
    }


def alignment_facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    out_weight: Tensor,
    members: Tensor,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """Directions of queries, keys and values, by class.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        x: a block's input `[b n c]`.
        out_weight: weight of the output projection `[c h*d]`.
        members: bool `[b n k]`.
        kept: queries that are no padding, bool `[b n]`; None = all.

    Returns:
        `qk/<class>` `[b]`: cosine of a head's mean query with the keys of the class, mean over
        heads; `qk` `[b h k]`: by head. `ov/<class>` `[b]`: cosine of W_o v_j with x_j itself;
        `ov` `[b k k]`: with the x_i of each class (receiver, sender).
    """
    qk = ops.qk_alignment(q.float(), k.float(), kept)
    qk = ops.class_mean(qk.transpose(1, 2), members).transpose(1, 2)  # [b h k]
    ov = ops.ov_alignment(x.float(), v.float(), out_weight.float(), members)
    facts = by_class("qk", qk.mean(1)) | by_class("ov", ov[..., -1])
    return facts | {"qk": qk, "ov": ov[..., :-1]}
