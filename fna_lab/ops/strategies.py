"""What can be done with a token set T beside taking it out of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.checks import check_bool, check_choice, check_float
from fna_lab.ops.detectors import suppression
from fna_lab.ops.patterns import token_rows

REPLACEMENTS = ("mean", "permutation", "median")
MOVES = ("concatenation", "mean_concatenation", "permutation_concatenation")
CORRECTIONS = ("relu_sum", "sum_relu")


def replace_tokens(
    x: Tensor,
    tokens: Tensor,
    how: str,
    *,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    window: int = 7,
    seed: int = 0,
    kept: Tensor | None = None,
) -> Tensor:
    """Put other tokens in the place of T.

    `mean`: the mean of the picture's other patch tokens. `permutation`: each gets another patch
    token of the picture, drawn at random. `median`: the patch token of median norm among those of
    the window around it that are not in T (the picture's own median where all of them are).

    Args:
        x: hidden states `[b n c]`.
        tokens: T, bool `[b n]`.
        how: one of `REPLACEMENTS`.
        prefix: number of prefix tokens, which are never put anywhere.
        grid: (rows, columns) of the patch tokens; only `median` needs it.
        window: side of the window of `median`, odd, in patches.
        seed: of the draw, which depends on the number of tokens alone.
        kept: tokens that are no padding, bool `[b n]`; padding is never put anywhere, and the draw
            does not depend on how much of it there is. None = all.

    Returns:
        `[b n c]`, equal to `x` outside of T.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a name is unknown, or the grid is missing.

    Source: the token replacement of Fast Nystroem Attention's companion study.
    """
    check_float("x", x, 3, "[b n c]")
    check_bool("tokens", tokens, tuple(x.shape[:2]))
    check_choice("how", how, REPLACEMENTS)
    patches, chosen = x[:, prefix:], tokens[:, prefix:]
    free = ~chosen
    if kept is not None:
        check_bool("kept", kept, tuple(x.shape[:2]))
        free = free & kept[:, prefix:]
    if how == "mean":
        # Half precision would overflow in the sum, and cannot count beyond 256 or 2048.
        wide = torch.promote_types(x.dtype, torch.float32)
        total = patches.to(wide).masked_fill(~free[..., None], 0).sum(1, keepdim=True)
        other = total / free.sum(1)[:, None, None].clamp(min=1)
        other = other.to(x.dtype).expand_as(patches)
    elif how == "permutation":
        generator = torch.Generator().manual_seed(seed)
        size = patches.shape[1]
        # One order of candidates a position; the first that is not in T is taken.
        draw = torch.rand(size, size, generator=generator, dtype=torch.float32, device="cpu")
        if kept is not None:
            draw = _in_shells(draw)
        rows, valid = token_rows(chosen)
        picks = draw.to(x.device)[rows].masked_fill(~free[:, None], -1).argmax(2)  # [b t]
        source = torch.arange(size, device=x.device).repeat(len(x), 1)
        source = source.scatter(1, rows, torch.where(valid, picks, rows))
        other = patches.gather(1, source[..., None].expand_as(patches))
    else:
        if grid is None or grid[0] * grid[1] != patches.shape[1]:
            raise ValueError(f"Expected grid to hold {patches.shape[1]} patch tokens, got {grid}.")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"Expected window to be an odd integer >= 1, got {window!r}.")
        source = _median_neighbour(patches.float().norm(dim=-1), free, grid, window)
        other = patches.gather(1, source[..., None].expand_as(patches))
    replaced = torch.where(chosen[..., None], other, patches)
    return torch.cat([x[:, :prefix], replaced], dim=1)


def moved_tokens(x: Tensor, tokens: Tensor, how: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What stands behind the others for T, once other tokens are put in its place.

    `concatenation`: the tokens of T themselves. `mean_concatenation`: as often, their mean.
    `permutation_concatenation`: each with its channels in another order, the same for all, which
    keeps its norm and loses its direction.

    Args:
        x: hidden states `[b n c]`.
        tokens: T, bool `[b n]`.
        how: one of `MOVES`.
        seed: of the order, which depends on the number of channels alone.

    Returns:
        `[b t c]`, padded with zeros to the largest set of the batch, and bool `[b t]`, False where
        it is padding.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a name is unknown.

    Source: the concatenations of Fast Nystroem Attention's companion study; what its mean and its
    permutation are of is our reading.
    """
    check_float("x", x, 3, "[b n c]")
    check_bool("tokens", tokens, tuple(x.shape[:2]))
    check_choice("how", how, MOVES)
    rows, valid = token_rows(tokens)
    moved = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    if how == "permutation_concatenation":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(x.shape[2], generator=generator, device="cpu")
        moved = moved[..., order.to(x.device)]
    elif how == "mean_concatenation":
        wide = torch.promote_types(x.dtype, torch.float32)
        total = moved.to(wide).masked_fill(~valid[..., None], 0).sum(1, keepdim=True)
        mean = total / valid.sum(1)[:, None, None].clamp(min=1)
        moved = mean.to(x.dtype).expand_as(moved)
    return moved.masked_fill(~valid[..., None], 0), valid


def redistribute(
    weights: Tensor,
    tokens: Tensor,
    *,
    keep: float = 0.6,
    max_share: float = 0.5,
    min_patches: float = 0.2,
    prefix: int = 1,
) -> Tensor:
    """Move attention from T to the other patch tokens, in proportion to what those have.

    A row of a head is changed where the patch tokens draw at least `min_patches` of it and T at
    most `max_share` of that; T then keeps a part of its weight. Rows still sum to what they did.

    Args:
        weights: attention `[b h n n]`.
        tokens: T, bool `[b n]`.
        keep: part of its weight that T keeps, 0 to 1.
        max_share: most of the patch tokens' attention that T may have.
        min_patches: least of a row's attention that the patch tokens must have.
        prefix: number of prefix tokens.

    Returns:
        `[b h n n]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a share lies outside 0 to 1.

    Source: Kang et al. 2025 (visual attention redistribution), for a ViT.
    """
    check_float("weights", weights, 4, "[b h n n]")
    check_bool("tokens", tokens, (weights.shape[0], weights.shape[3]))
    for name, value in (("keep", keep), ("max_share", max_share), ("min_patches", min_patches)):
        if not 0 <= value <= 1:
            raise ValueError(f"Expected {name} from 0 to 1, got {value!r}.")
    is_patch = torch.arange(weights.shape[3], device=weights.device) >= prefix
    chosen = (tokens & is_patch)[:, None, None]
    other = (~tokens & is_patch)[:, None, None]
    mass = weights.masked_fill(~chosen, 0).sum(-1, keepdim=True)
    rest = weights.masked_fill(~other, 0).sum(-1, keepdim=True)
    patches = mass + rest
    changed = (patches >= min_patches) & (mass <= max_share * patches) & (rest > 0)
    # Rows that stay get a harmless divisor: 0 would spoil the gradient of the others.
    grow = 1 + (1 - keep) * mass / torch.where(changed, rest, 1)
    moved = torch.where(chosen, keep * weights, torch.where(other, grow * weights, weights))
    return torch.where(changed, moved, weights)


def projection_correction(
    weights: Tensor,
    x: Tensor,
    v: Tensor,
    out_weight: Tensor,
    pairs: Tensor,
    *,
    clamp: float = 0.0,
    order: str = "relu_sum",
) -> Tensor:
    """What gives token i back of its own direction that other tokens take from it.

    scale_i = sum_j m_ij sum_h A_hij relu(clamp - s_ijh) (`relu_sum`), or
    sum_j m_ij relu(clamp - sum_h A_hij s_ijh) (`sum_relu`), with s of `suppression`.

    Args:
        weights: attention `[b h n n]`.
        x: the block's input `[b n c]`.
        v: values `[b h n d]`.
        out_weight: weight of the output projection `[c h*d]`.
        pairs: m, bool `[b n n]` (query, key).
        clamp: least projection that is left alone.
        order: one of `CORRECTIONS`.

    Returns:
        scale_i times the unit vector of x_i, `[b n c]`: to be added to the attention's output.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the order is unknown.

    Source: the projection correction of Fast Nystroem Attention's companion study.
    """
    check_choice("order", order, CORRECTIONS)
    check_float("weights", weights, 4, "[b h n n]")
    check_bool("pairs", pairs, (weights.shape[0], *weights.shape[2:]))
    seen = suppression(x, v, out_weight)
    if order == "relu_sum":
        scale = (weights * (clamp - seen).clamp(min=0)).sum(1)
    else:
        scale = (clamp - (weights * seen).sum(1)).clamp(min=0)
    scale = scale.masked_fill(~pairs, 0).sum(-1, keepdim=True)
    return (scale * F.normalize(x.to(scale.dtype), dim=-1)).to(x.dtype)


def _in_shells(draw: Tensor) -> Tensor:
    """A square of numbers `[p p]` in an order in which a larger square begins with a smaller."""
    place = torch.arange(draw.shape[0], device=draw.device)
    outer = torch.maximum(place[:, None], place)
    return draw.flatten()[outer * outer + outer + place[:, None] - place]


def _median_neighbour(norms: Tensor, free: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """For each patch the index of the free token of median norm around it: long `[b p]`."""
    batch, size = norms.shape
    half = window // 2
    padded = norms.masked_fill(~free, torch.inf).view(batch, 1, *grid)
    padded = F.pad(padded, (half,) * 4, value=torch.inf)
    around = F.unfold(padded, window)  # [b w*w p]
    place = torch.arange(size, device=norms.device).view(1, 1, *grid).double()
    place = F.unfold(F.pad(place, (half,) * 4), window).long()
    order = around.sort(dim=1, stable=True)
    count = around.isfinite().sum(1, keepdim=True)
    middle = ((count - 1) // 2).clamp(min=0)
    inside = place.expand(batch, -1, -1).gather(1, order.indices.gather(1, middle))[:, 0]
    whole = norms.masked_fill(~free, torch.inf).sort(dim=1, stable=True).indices
    centre = whole.gather(1, ((free.sum(1, keepdim=True) - 1) // 2).clamp(min=0))
    return torch.where(count[:, 0] > 0, inside, centre)
