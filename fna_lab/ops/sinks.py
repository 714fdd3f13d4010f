"""How much attention each token draws, in chunks of queries, and which tokens are sinks by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fna_lab.ops.attention import attention_logits
from fna_lab.ops.checks import check_bool, check_choice, check_float, check_integer, default_scale
from fna_lab.ops.padding import num_kept, without_padding_rows
from fna_lab.ops.patterns import STAGES

# The published thresholds: nine uniform shares, seven standard deviations.
INCOMING_RULES = {"raw": 9.0, "std": 7.0}


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: slice,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    found: Tensor | None = None,
    stage: str = "mask",
) -> Tensor:
    """Some rows of the attention, under tokens that nobody attends to (`type1`).

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        rows: which queries.
        scale: factor of the logits; None = d^-1/2.
        bias: added to the logits, broadcastable to `[b h n n]`.
        found: tokens that were taken away, bool `[b n]`; None = nothing.
        stage: `mask` (before softmax) or `sink` (after it).

    Returns:
        `[b h r n]`, in at least float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the stage is unknown.
    """
    check_float("q", q, 4, "[b h n d]")
    check_float("k", k, 4, "[b h n d]")
    check_choice("stage", stage, STAGES)
    if q.shape != k.shape:
        raise ValueError(f"Expected q and k to fit, got {tuple(q.shape)} and {tuple(k.shape)}.")
    scale = default_scale(q) if scale is None else scale
    logits = attention_logits(q[:, :, rows], k, scale)
    if bias is not None:
        logits = logits + bias.expand(*q.shape[:3], k.shape[2])[:, :, rows]
    if found is None:
        return logits.softmax(-1)
    check_bool("found", found, (q.shape[0], q.shape[2]))
    gone = found[:, None, None]
    if stage == "mask":
        return logits.masked_fill(gone, -torch.inf).softmax(-1)
    return logits.softmax(-1).masked_fill(gone, 0.0)


def incoming_by_head(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    found: Tensor | None = None,
    stage: str = "mask",
    kept: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    """Attention that each token draws in each head: alpha_k = mean_i A[i, k].

    Args:
        kept: queries that are no padding, bool `[b n]`; None = all.
        chunk: queries at a time, so that `[b h n n]` never exists; the rest as for
            `attention_rows`.

    Returns:
        `[b h n]`, in at least float32; sums to 1 over the tokens where nothing was taken away
        after softmax.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or `chunk` < 1.

    Source: Gu et al. 2024, "When Attention Sink Emerges in Language Models", without the causal
    factor.
    """
    _check_kept(q, kept)
    total = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows in _chunks(q.shape[2], chunk):
        weights = attention_rows(q, k, rows, scale=scale, bias=bias, found=found, stage=stage)
        total = total + without_padding_rows(weights, kept, rows).sum(2)
    return total / (q.shape[2] if kept is None else kept.sum(1)[:, None, None])


def incoming_share(
    q: Tensor,
    k: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    found: Tensor | None = None,
    stage: str = "mask",
    kept: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    """Share of the others' attention that each patch token draws, prefix tokens left aside.

    With the heads averaged: the columns of the prefix tokens become zero, rows are normalised to
    sum 1, the diagonal becomes zero, and the mean over the rows is taken.

    Args:
        prefix: number of prefix tokens; with CLS alone this is the published form.
        kept: queries that are no padding, bool `[b n]`; None = all.
        chunk: queries at a time, so that `[b h n n]` never exists; the rest as for
            `attention_rows`.

    Returns:
        `[b n]`, in at least float32; the uniform share is about 1 / (number of patch tokens).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or `chunk` < 1.

    Source: the incoming-attention rules of Fast Nystroem Attention's companion study.
    """
    tokens = q.shape[2]
    _check_kept(q, kept)
    place = torch.arange(tokens, device=q.device)
    total = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows in _chunks(tokens, chunk):
        weights = attention_rows(q, k, rows, scale=scale, bias=bias, found=found, stage=stage)
        weights = without_padding_rows(weights, kept, rows).mean(1)
        weights = weights.masked_fill(place < prefix, 0.0)
        tiny = torch.finfo(weights.dtype).tiny  # a row may lose everything after softmax
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=tiny)
        weights = weights.masked_fill(place[rows, None] == place, 0.0)
        total = total + weights.sum(1)
    return total / num_kept(kept, tokens)


def incoming_sinks(
    share: Tensor,
    *,
    prefix: int = 1,
    found: Tensor | None = None,
    rule: str = "raw",
    factor: float | None = None,
    log: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens that draw far more attention than the others, and by how much.

    `raw`: share > factor / (number of patch tokens that are not taken away). `std`: share > mean +
    factor standard deviations of the patch tokens that are left. Of n tokens none can lie more
    than (n - 1) / sqrt(n) deviations above the mean, so that 7 need at least 51.

    Args:
        share: of `incoming_share`, `[b n]`.
        prefix: number of prefix tokens, which are never sinks.
        found: tokens that were taken away before, bool `[b n]`; None = nothing.
        rule: `raw` or `std`.
        factor: of the rule; None = 9 for `raw`, 7 for `std`, as published.
        log: take the logarithm of the shares first; for `std` alone.

    Returns:
        bool `[b n]`, and `[b n]`: uniform shares (`raw`) or standard deviations (`std`), -inf for
        tokens that cannot be found.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a setting is out of range.

    Source: the incoming-attention rules of Fast Nystroem Attention's companion study.
    """
    check_float("share", share, 2, "[b n]")
    check_choice("rule", rule, tuple(INCOMING_RULES))
    factor = INCOMING_RULES[rule] if factor is None else factor
    if not factor > 0:
        raise ValueError(f"Expected factor to be > 0, got {factor!r}.")
    if log and rule != "std":
        raise ValueError(f"Expected log only with rule='std', got rule={rule!r}.")
    free = torch.arange(share.shape[1], device=share.device) >= prefix
    free = free.expand(share.shape)
    if found is not None:
        check_bool("found", found, tuple(share.shape))
        free = free & ~found
    if rule == "raw":
        height = share * free.sum(1, keepdim=True)
    else:
        height = standard_scores(share.clamp(min=1e-30).log() if log else share, free)
    height = height.masked_fill(~free, -torch.inf)
    return height > factor, height


def sink_rate(incoming: Tensor, *, epsilon: float = 0.3) -> Tensor:
    """Share of the heads in which a token is a sink: incoming attention above epsilon.

    Args:
        incoming: attention that each token draws in each head `[b h n]`.
        epsilon: the threshold.

    Returns:
        `[b n]`, from 0 to 1.

    Raises:
        TypeError: `incoming` is not a floating tensor.
        ValueError: it is not `[b h n]`, or epsilon is not between 0 and 1.

    Source: Gu et al. 2024, "When Attention Sink Emerges in Language Models", section 3.
    """
    check_float("incoming", incoming, 3, "[b h n]")
    if not 0 < epsilon < 1:
        raise ValueError(f"Expected epsilon to be between 0 and 1, got {epsilon!r}.")
    return (incoming > epsilon).to(incoming.dtype).mean(1)


def standard_scores(values: Tensor, allowed: Tensor) -> Tensor:
    """Distance from the picture's mean in its standard deviations, over the allowed tokens.

    Args:
        values: `[b n]`.
        allowed: the tokens that mean and deviation (n - 1 in its denominator) are taken over,
            bool `[b n]`.

    Returns:
        `[b n]`; zeros where the deviation is zero.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_float("values", values, 2, "[b n]")
    check_bool("allowed", allowed, tuple(values.shape))
    count = allowed.sum(1, keepdim=True)
    off = values.masked_fill(~allowed, 0.0)
    off = off - off.sum(1, keepdim=True) / count.clamp(min=1)
    off = off.masked_fill(~allowed, 0.0)
    deviation = (off.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(deviation > 0, off / deviation, torch.zeros_like(off))


def _check_kept(q: Tensor, kept: Tensor | None) -> None:
    if kept is not None:
        check_bool("kept", kept, (q.shape[0], q.shape[2]))


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    check_integer("chunk", chunk)
    return (slice(i, min(i + chunk, tokens)) for i in range(0, tokens, chunk))
