"""The maths of token anatomy: sums by token class, suppression, alignment, components."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_float, check_index, check_integer
from fna_lab.ops.token_classes import TOKEN_CLASSES


def class_members(classes: Tensor) -> Tensor:
    """Which token belongs to which class: `token_classes` long `[b n]` -> bool `[b n 5]`.

    Raises:
        TypeError: not a long tensor.
        ValueError: not `[b n]`.
    """
    check_index("classes", classes, "[b n]")
    places = torch.arange(len(TOKEN_CLASSES), device=classes.device)
    return classes[..., None] == places


def class_mean(values: Tensor, members: Tensor) -> Tensor:
    """Mean over the tokens of each class, picture by picture.

    Args:
        values: `[b n ...]`.
        members: bool `[b n k]`, which token is in which class.

    Returns:
        `[b k ...]` in at least float32; NaN where a picture has no token of the class.

    Raises:
        TypeError: `values` is not floating or `members` not boolean.
        ValueError: shapes do not fit.
    """
    check_float("values", values, values.ndim, "[b n ...]")
    check_bool("members", members, (*values.shape[:2], members.shape[-1]))
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    total = members.to(wide.dtype).mT @ wide.reshape(*wide.shape[:2], -1)
    count = members.sum(1)[..., None]
    mean = torch.where(count > 0, total / count, torch.nan)
    return mean.reshape(*mean.shape[:2], *values.shape[2:])


def class_max(values: Tensor, members: Tensor) -> Tensor:
    """Largest value among the tokens of each class: `[b n]` -> `[b k]`, NaN where there is none.

    Raises:
        TypeError: `values` is not floating or `members` not boolean.
        ValueError: shapes do not fit.
    """
    check_float("values", values, 2, "[b n]")
    check_bool("members", members, (*values.shape, members.shape[-1]))
    largest = values[..., None].masked_fill(~members, -torch.inf).amax(1)
    return torch.where(members.any(1), largest, torch.nan)


def class_sums(matrix: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Sum of a query-by-key matrix over the pairs of each two classes, head by head.

    Additive over pieces of the queries, so that a long matrix need not be there at once.

    Args:
        matrix: `[b h m n]`, such as attention.
        queries: bool `[b m k]`, classes of the queries.
        keys: bool `[b n k]`, classes of the keys.

    Returns:
        `[b h k k]` (query class, key class).

    Raises:
        TypeError: `matrix` is not floating.
        ValueError: shapes do not fit.
    """
    check_float("matrix", matrix, 4, "[b h m n]")
    batch, _, m, n = matrix.shape
    if queries.shape[:2] != (batch, m) or keys.shape[:2] != (batch, n):
        raise ValueError(
            f"Expected queries [b m k] and keys [b n k] to fit {tuple(matrix.shape)}, got "
            f"{tuple(queries.shape)}, {tuple(keys.shape)}."
        )
    left, right = queries.to(matrix.dtype)[:, None], keys.to(matrix.dtype)[:, None]
    return left.mT @ (matrix @ right)


def top_activations(x: Tensor, num: int = 3) -> tuple[Tensor, Tensor]:
    """Largest absolute activations over all tokens and channels of a picture.

    Args:
        x: hidden states `[b n c]`.
        num: how many.

    Returns:
        Values `[b num]`, largest first, and places long `[b num]`: token * c + channel.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b n c]`, or `num` is not between 1 and n * c.

    Source: Sun et al. 2024, Massive Activations in Large Language Models, section 2.
    """
    check_float("x", x, 3, "[b n c]")
    check_integer("num", num, most=x[0].numel())
    values, places = x.abs().flatten(1).topk(num, dim=1)
    return values, places


def per_head(out_weight: Tensor, heads: int) -> Tensor:
    """The output projection head by head: `[c h*d]` -> `[h c d]`.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not `[c h*d]`.
    """
    check_float("out_weight", out_weight, 2, "[c h*d]")
    if out_weight.shape[1] % heads:
        raise ValueError(f"Expected out_weight [c h*d] of {heads} heads, got {out_weight.shape}.")
    return out_weight.unflatten(1, (heads, -1)).transpose(0, 1)


def class_suppression(x: Tensor, v: Tensor, out_weight: Tensor, members: Tensor) -> Tensor:
    """The suppression matrix averaged over the pairs of each two classes, in O(n c d).

    A mean over pairs of unit(x_i) . (W_o^h v_j^h) is the product of two means, so that the
    matrix itself is never there.

    Args:
        x: hidden states `[b n c]`.
        v: values `[b h n d]`.
        out_weight: weight of the output projection `[c h*d]`.
        members: bool `[b n k]`.

    Returns:
        `[b h k k]` (pushed class, pushing class); negative = shrinks. NaN for absent classes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.

    Source: the suppression matrix of Fast Nystroem Attention's companion study.
    """
    check_float("x", x, 3, "[b n c]")
    check_float("v", v, 4, "[b h n d]")
    weight = per_head(out_weight, v.shape[1]).to(x.dtype)
    unit = class_mean(F.normalize(x, dim=-1), members)  # [b k c]
    value = class_mean(v.transpose(1, 2), members).transpose(1, 2)  # [b h k d]
    return torch.einsum("bkc,hcd,bhld->bhkl", unit, weight.to(unit.dtype), value)


def qk_alignment(q: Tensor, k: Tensor, kept: Tensor | None = None) -> Tensor:
    """Cosine between the mean query of a head and each key.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        kept: queries that are no padding, bool `[b n]`; None = all.

    Returns:
        `[b h n]`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit.
    """
    check_float("q", q, 4, "[b h n d]")
    check_float("k", k, 4, "[b h n d]")
    if kept is None:
        return torch.cosine_similarity(q.mean(2, keepdim=True), k, dim=-1)
    check_bool("kept", kept, (q.shape[0], q.shape[2]))
    mean = (q * kept[:, None, :, None]).sum(2, keepdim=True) / kept.sum(1)[:, None, None, None]
    return torch.cosine_similarity(mean, k, dim=-1)


def ov_alignment(x: Tensor, v: Tensor, out_weight: Tensor, members: Tensor) -> Tensor:
    """Cosine between what a token sends, W_o v_j, and the directions of tokens by class.

    Args:
        x: hidden states `[b n c]`.
        v: values `[b h n d]`; the heads are put together.
        out_weight: weight of the output projection `[c h*d]`.
        members: bool `[b n k]`.

    Returns:
        `[b k k+1]`: mean cosine between x_i of the first class and W_o v_j of the second, over
        all pairs; the last column holds i = j. NaN for absent classes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("x", x, 3, "[b n c]")
    check_float("v", v, 4, "[b h n d]")
    sent = v.transpose(1, 2).flatten(2) @ out_weight.to(v.dtype).mT  # [b n c]
    sent = torch.nn.functional.normalize(sent, dim=-1)
    unit = torch.nn.functional.normalize(x, dim=-1)
    pairs = class_mean(unit, members) @ class_mean(sent, members).mT
    own = class_mean((unit * sent).sum(-1, keepdim=True), members)
    return torch.cat([pairs, own], dim=-1)


def principal_components(
    x: Tensor, num: int = 3, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Projection of the tokens of a picture on their own principal components.

    Args:
        x: features `[b p c]`.
        num: how many components.
        kept: tokens that are no padding, bool `[b p]`; None = all. Others score 0.

    Returns:
        Scores `[b p num]` in float64, and the share of the variance that each component explains
        `[b num]`. The entry of largest size of each component's scores is positive.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b p c]`, or `num` is not between 1 and min(p, c).
    """
    check_float("x", x, 3, "[b p c]")
    check_integer("num", num, most=min(x.shape[1:]))
    if kept is None:
        centred = x.double() - x.double().mean(1, keepdim=True)
    else:
        check_bool("kept", kept, tuple(x.shape[:2]))
        mine = x.double() * kept[..., None]
        centred = mine - mine.sum(1, keepdim=True) / kept.sum(1)[:, None, None]
        centred = centred * kept[..., None]
    values, vectors = torch.linalg.eigh(centred.mT @ centred)  # ascending
    scores = centred @ vectors.flip(-1)[..., :num]
    largest = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    total = values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return scores * largest.sign(), values.flip(-1)[:, :num].clamp(min=0) / total
