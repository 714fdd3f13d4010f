"""The maths of detectors: hidden states or attention -> the token set T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import attention_logits
from fna_lab.ops.checks import check_bool, check_float, check_integer, default_scale
from fna_lab.ops.padding import medians, patches_of


def norm_gap(
    x: Tensor,
    *,
    prefix: int = 1,
    per_picture: bool = False,
    min_gap: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """Massive patch tokens: those above the largest gap of the sorted log norms.

    The published form pools the patch tokens of the batch, and always finds something. With
    `per_picture` a picture does not depend on its batch mates; with `min_gap` a picture whose
    largest gap is smaller has no massive token.

    Args:
        x: hidden states `[b n c]`.
        prefix: number of prefix tokens, which are never massive.
        per_picture: look for the gap in each picture on its own.
        min_gap: least gap, in natural log units (0.7 = a factor of two).
        kept: tokens that are no padding, bool `[b n]`; None = all.

    Returns:
        bool `[b n]`, prefix tokens False.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b n c]` or holds fewer than two patch tokens.

    Source: Fast Nystroem Attention's companion study of massive tokens (norm-gap heuristic).
    """
    norms = patch_norms(x, prefix)
    norms = norms.clamp(min=torch.finfo(norms.dtype).tiny).log()  # no gap above infinity
    if kept is not None:
        # As low as the lowest, padding opens no gap and lies above none.
        mine = patches_of(kept, norms)
        lowest = norms.masked_fill(~mine, torch.inf).amin(1, keepdim=True)
        norms = torch.where(mine, norms, lowest if per_picture else lowest.amin())
    pooled = norms if per_picture else norms.reshape(1, -1)
    ordered = pooled.sort(dim=1).values
    gaps = ordered.diff(dim=1)
    widest = gaps.argmax(1, keepdim=True)
    threshold = ordered.gather(1, widest)
    wide_enough = gaps.gather(1, widest) >= min_gap
    return _with_prefix((norms > threshold) & wide_enough, prefix)


def norm_ratio(
    x: Tensor, *, prefix: int = 1, ratio: float = 5.0, kept: Tensor | None = None
) -> Tensor:
    """Massive patch tokens: those whose norm exceeds `ratio` times the picture's median.

    Args:
        x: hidden states `[b n c]`.
        prefix: number of prefix tokens, which are never massive.
        ratio: threshold in units of the median patch norm.
        kept: tokens that are no padding, bool `[b n]`; None = all.

    Returns:
        bool `[b n]`, prefix tokens False.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b n c]`, has fewer than two patch tokens, or `ratio` <= 0.

    Source: after Darcet et al. 2024, figure 3, with a threshold relative to the picture.
    """
    if not ratio > 0:
        raise ValueError(f"Expected ratio to be > 0, got {ratio!r}.")
    norms = patch_norms(x, prefix)
    found = norms > ratio * medians(norms, kept)
    return _with_prefix(found if kept is None else found & patches_of(kept, norms), prefix)


def norm_fixed(x: Tensor, *, prefix: int = 1, norm: float) -> Tensor:
    """Massive patch tokens: those whose norm exceeds a fixed value.

    Args:
        x: hidden states `[b n c]`, before the final norm.
        prefix: number of prefix tokens, which are never massive.
        norm: the threshold, in the units of `x`.

    Returns:
        bool `[b n]`, prefix tokens False.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b n c]`, has fewer than two patch tokens, or `norm` <= 0.

    Source: Darcet et al. 2024; Jiang et al. 2025 (30 for CLIP B/16, 150 for DINOv2-L).
    """
    if not norm > 0:
        raise ValueError(f"Expected norm to be > 0, got {norm!r}.")
    return _with_prefix(patch_norms(x, prefix) > norm, prefix)


def cls_row(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """The attention of CLS alone, in O(n d).

    Args:
        q: queries `[b h n d]`, CLS first.
        k: keys `[b h n d]`.
        scale: factor of the logits; None = d^-1/2.

    Returns:
        `[b h 1 n]`, each row sums to 1, in at least float32.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: an argument is not `[b h n d]`.
    """
    check_float("q", q, 4, "[b h n d]")
    check_float("k", k, 4, "[b h n d]")
    scale = default_scale(q) if scale is None else scale
    return attention_logits(q[:, :, :1], k, scale).softmax(-1)


def cls_proxy(
    pattern: Tensor, *, ratio: float = 1.0, top: int | None = None, found: Tensor | None = None
) -> Tensor:
    """Tokens that CLS attends to more than to itself: a cheap stand-in for attention sinks.

    With the heads averaged, token t is in T where a[CLS, t] > ratio a[CLS, CLS].

    Args:
        pattern: attention `[b h n n]`, or the row of CLS alone `[b h 1 n]`.
        ratio: 1.0 for sinks, 0.3 for massive tokens.
        top: consider only so many of the best candidates of each picture; None = all.
        found: tokens found before, bool `[b n]`, which are never returned again.

    Returns:
        bool `[b n]`, CLS False.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, `ratio` <= 0 or `top` < 1.

    Source: the CLS proxy of Fast Nystroem Attention's companion study of attention sinks.
    """
    check_float("pattern", pattern, 4, "[b h n n] or [b h 1 n]")
    if pattern.shape[2] not in (1, pattern.shape[3]):
        raise ValueError(
            f"Expected pattern to be [b h n n] or [b h 1 n], got {tuple(pattern.shape)}."
        )
    if not ratio > 0:
        raise ValueError(f"Expected ratio to be > 0, got {ratio!r}.")
    row = pattern[:, :, 0].mean(1)  # [b n]
    own = row[:, :1]
    open_ = torch.ones_like(row, dtype=torch.bool)
    open_[:, 0] = False
    if found is not None:
        check_bool("found", found, tuple(row.shape))
        open_ &= ~found
    if top is not None:
        check_integer("top", top)
        best = row.masked_fill(~open_, -1).topk(min(top, row.shape[1]), dim=1).indices
        open_ &= torch.zeros_like(open_).scatter(1, best, True)
    return open_ & (row > ratio * own)


def incoming(pattern: Tensor) -> Tensor:
    """Attention that each token draws: the mean over queries and heads.

    Args:
        pattern: attention `[b h n n]`.

    Returns:
        `[b n]`, sums to 1 over the tokens.

    Raises:
        TypeError: `pattern` is not a floating tensor.
        ValueError: `pattern` is not `[b h n n]`.
    """
    check_float("pattern", pattern, 4, "[b h n n]")
    return pattern.mean((1, 2))


def suppression(x: Tensor, v: Tensor, out_weight: Tensor) -> Tensor:
    """How far the value of token j pushes token i along i's own direction.

    s[i, j] = unit(x_i) . (W_o^h v_j^h), head by head; negative = j would shrink i.

    Args:
        x: hidden states `[b n c]`.
        v: values `[b h n d]`.
        out_weight: weight of the output projection `[c h*d]`, as `nn.Linear` keeps it.

    Returns:
        `[b h n n]`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit.

    Source: the suppression matrix of Fast Nystroem Attention's companion study.
    """
    check_float("x", x, 3, "[b n c]")
    check_float("v", v, 4, "[b h n d]")
    check_float("out_weight", out_weight, 2, "[c h*d]")
    batch, heads, tokens, dim = v.shape
    if x.shape[:2] != (batch, tokens) or out_weight.shape != (x.shape[2], heads * dim):
        raise ValueError(
            "Expected x [b n c], v [b h n d] and out_weight [c h*d] to fit, got "
            f"{tuple(x.shape)}, {tuple(v.shape)}, {tuple(out_weight.shape)}."
        )
    unit = F.normalize(x, dim=-1)
    per_head = out_weight.unflatten(1, (heads, dim))  # [c h d]
    # Through the head dim first: O(n c h d + h n^2 d), never [b h n c].
    seen = torch.einsum("bic,chd->bhid", unit, per_head)
    return seen @ v.mT


def patch_norms(x: Tensor, prefix: int) -> Tensor:
    """Norms of the patch tokens, in at least float32: hidden states `[b n c]` -> `[b p]`.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not `[b n c]` or holds fewer than two patch tokens.
    """
    check_float("x", x, 3, "[b n c]")
    check_integer("prefix", prefix, least=0)
    if x.shape[1] - prefix < 2:
        raise ValueError(
            f"Expected at least two patch tokens, got {x.shape[1]} tokens with prefix={prefix}."
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    return x[:, prefix:].to(wide).norm(dim=-1)


def _with_prefix(patches: Tensor, prefix: int) -> Tensor:
    return torch.cat([patches.new_zeros((patches.shape[0], prefix)), patches], dim=1)
