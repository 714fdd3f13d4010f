"""Nystroem attention on chosen landmark tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fna_lab.ops.attention import attention_logits, full_precision
from fna_lab.ops.checks import check_bool, check_choice, check_index, check_qkv, default_scale
from fna_lab.ops.kernels.switch import chain_products
from fna_lab.ops.solvers import newton_schulz, ridge_solve
from fna_lab.ops.spread import batch_rows

SOLVERS = ("newton_schulz", "ridge", "pinv")


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    scale: float | None = None,
    solver: str | Callable[[Tensor, Tensor], Tensor] = "newton_schulz",
    iters: int = 6,
    ridge: float = 1e-3,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    distinct: bool | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Attention that is linear in n: softmax(s Q Kp') Z(A) softmax(s Qp K') V.

    Qp and Kp are the rows of the landmarks, A = softmax(s Qp Kp'). A and Z(A) are taken in at
    least float32, whatever the input and autocast say.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        landmarks: token indices, long `[b m]`, or `[b h m]` where heads have their own.
        scale: factor of the logits; None = d^-1/2.
        solver: what stands for the inverse of A: `newton_schulz`, `ridge`, `pinv`, or a callable
            (A `[b h m m]`, B `[b h m d]`) -> Z(A) B.
        iters: iterations of `newton_schulz`.
        ridge: regularisation of `ridge`.
        keys: bool `[b n]`, True = may be attended to; None = all. Landmarks must be such keys.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing.
        distinct: False where landmarks may repeat; a repeat then does not weigh twice. None = they
            may with `keys`, where few are kept, and not without.
        exact_rows: give so many of the first landmarks their exact outputs, softmax(s Qp K') V,
            which the chain has taken on its way anyhow.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the solver is unknown.

    Source: Xiong et al. 2021 (Nystroemformer) with sampled landmarks, as in Fast Nystroem
    Attention.
    """
    check_qkv(q, k, v)
    check_landmarks(landmarks, q)
    if keys is not None:
        check_bool("keys", keys, (q.shape[0], k.shape[2]))
    if not callable(solver):
        check_choice("solver", solver, SOLVERS)
    scale = default_scale(q) if scale is None else scale
    q_marks, k_marks = gather_tokens(q, landmarks), gather_tokens(k, landmarks)

    rows = columns = corner = None
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        rows = gather_tokens(bias, landmarks)  # [b h m n]
        columns = gather_tokens(bias.mT, landmarks).mT  # [b h n m]
        corner = gather_tokens(columns, landmarks)  # [b h m m]
    repeated = None
    if keys is not None:
        rows = only_keys(keys, rows)
    if not (keys is None if distinct is None else distinct):
        # Fewer kept keys than landmarks: the repeats must neither weigh twice nor make A singular.
        repeated = repeated_landmarks(landmarks)
        columns = only_keys(~repeated, columns)

    def solve(kernel: Tensor, values: Tensor) -> Tensor:
        return _solve(kernel, values, solver, iters, ridge)

    out, exact, _ = nystrom_chain(
        q,
        k,
        v,
        q_marks,
        k_marks,
        solve,
        scale=scale,
        rows=rows,
        columns=columns,
        corner=corner,
        dead=repeated,
    )
    if not exact_rows:
        return out
    return put_tokens(out, landmarks[..., :exact_rows], exact[:, :, :exact_rows])


def nystrom_chain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    solve: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    corner: Tensor | None = None,
    dead: Tensor | None = None,
    gone: Tensor | None = None,
    prior: Tensor | None = None,
    gather: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three products of Nystroem attention, for landmarks given as vectors.

    There may be more or fewer landmark queries than landmark keys, if `solve` takes such an A.

    Kernels take the two long ones, in Triton on CUDA and in C++ on processors; see
    `fna_lab.ops.kernels.switch`, also for what keeps to torch. A and Z(A) are torch's, in at least
    float32.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        q_marks: landmark queries `[b h r d]`.
        k_marks: landmark keys `[b h m d]`.
        solve: (A `[b h r m]`, B `[b h r d]`) -> Z(A) B.
        scale: factor of the logits.
        rows: `attn_mask` of landmark queries x keys, broadcastable to `[b h r n]`.
        columns: `attn_mask` of queries x landmark keys, broadcastable to `[b h n m]`.
        corner: added to the logits of A, broadcastable to `[b h r m]`.
        dead: landmarks that stand for nothing, bool `[b m]` or `[b h m]`; `columns` must leave
            them out too.
        gone: queries that tell nothing, bool `[b r]` or `[b h r]`; None = those of the dead
            landmarks, which then must be the first m.
        prior: values P `[b h m d]` that the solution departs from: P + Z(A) (B - A P).
        gather: what takes softmax(s Qp K') V, called as `scaled_dot_product_attention` is.

    Returns:
        The approximation `[b h n d]`, the exact rows of the landmark queries `[b h r d]`, and the
        values V' that all queries took of the landmarks `[b h m d]`.
    """
    few, spread = chain_products(q, k, v, q_marks, k_marks, rows=rows, columns=columns)
    exact = (gather or few)(q_marks, k, v, attn_mask=rows, scale=scale)
    with full_precision(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = attention_logits(q_marks, k_marks, scale, corner)
        gathered = exact.to(wide)
        if dead is not None:
            dead = each_head(dead)
            logits = logits.masked_fill(dead[:, :, None], -torch.inf)
            if gone is None:  # A stays one that can be inverted
                alone = logits.new_full(logits.shape[-2:], -torch.inf).fill_diagonal_(0)
                logits = torch.where(dead[..., None], alone, logits)
                gathered = gathered.masked_fill(dead[..., None], 0)
        kernel = logits.softmax(-1)
        if gone is not None:
            gone = each_head(gone)[..., None]
            kernel, gathered = kernel.masked_fill(gone, 0), gathered.masked_fill(gone, 0)
        # Solvers may return columns side by side, which the fused kernel reads at a third of its
        # speed.
        if prior is None:
            solved = solve(kernel, gathered)
        else:
            prior = prior.to(wide)
            left = torch.baddbmm(*(x.flatten(0, 1) for x in (gathered, kernel, prior)), alpha=-1)
            solved = solve(kernel, left.view_as(gathered)) + prior
        solved = solved.to(v.dtype).contiguous()
    if torch.is_grad_enabled() and solved.requires_grad:  # parameters of the solver, too
        spread = F.scaled_dot_product_attention
    plain = spread is F.scaled_dot_product_attention and q.device.type != "cpu"
    if plain and columns is not None and columns.is_floating_point():
        columns = columns.to(q.dtype)  # elsewhere a wider bias is closer, and costs nothing
    return spread(q, k_marks, solved, attn_mask=columns, scale=scale), exact, solved


def subset_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    distinct: bool = True,
) -> Tensor:
    """Attention to the landmarks alone: softmax(s Q Kp') Vp.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h n d]`.
        v: values `[b h n d]`.
        landmarks: token indices, long `[b m]`, or `[b h m]` where heads have their own.
        scale: factor of the logits; None = d^-1/2.
        bias: added to the logits, broadcastable to `[b h n n]`; None = nothing.
        distinct: False where landmarks may repeat; a repeat then does not weigh twice.

    Returns:
        `[b h n d]`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit.
    """
    check_qkv(q, k, v)
    check_landmarks(landmarks, k)
    if bias is not None:
        bias = gather_tokens(bias.expand(*q.shape[:3], k.shape[2]).mT, landmarks).mT
    if not distinct:
        bias = only_keys(~repeated_landmarks(landmarks), bias)
    k, v = gather_tokens(k, landmarks), gather_tokens(v, landmarks)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def gather_tokens(x: Tensor, landmarks: Tensor) -> Tensor:
    """Rows of the landmarks: `[b h n d]`, long `[b m]` or `[b h m]` -> `[b h m d]`."""
    table = packed_rows(x) if landmarks.ndim == 2 else None
    if table is not None:  # whole rows at a time
        rows = F.embedding(batch_rows(landmarks, x.shape[2]), table)
        return rows.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
    index = each_head(landmarks)[..., None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def put_tokens(out: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """What attention gave, `[b h n d]`, with rows `[b h m d]` at long `[b m]` or `[b h m]`."""
    index = each_head(tokens)[..., None].expand_as(rows)
    if out.requires_grad:  # the fused kernel keeps its output for the backward pass
        # A token that stands there twice would be handed its gradient twice.
        again = each_head(repeated_landmarks(tokens))[..., None]
        return out.scatter(2, index, torch.where(again, rows.detach(), rows))
    return out.scatter_(2, index, rows)


def packed_rows(x: Tensor) -> Tensor | None:
    """All heads of a token as one row, without a copy where the host packs q, k and v.

    Args:
        x: `[b h n d]`.

    Returns:
        A view `[b*n h*d]`, whose rows lie a multiple of their length apart. None where only a
        copy has such rows, or gradients are asked for.
    """
    batch, heads, tokens, dim = x.shape
    width = heads * dim
    apart, across, stride, inner = x.stride()
    packed = inner == 1 and across == dim and stride > 0 and stride % width == 0
    packed = packed and (batch == 1 or apart == tokens * stride)
    if not packed or x.requires_grad or torch.compiler.is_compiling() or x.numel() == 0:
        return None
    return x.as_strided((batch * tokens, width), (stride, 1))


def each_head(found: Tensor) -> Tensor:
    """What all heads share, with a dimension for them: `[b m]` -> `[b 1 m]`, `[b h m]` as is."""
    return found if found.ndim == 3 else found[:, None]


def check_landmarks(landmarks: Tensor, q: Tensor) -> None:
    """Raise unless landmarks are long `[b m]` or `[b h m]` that fit q `[b h n d]`."""
    check_index("landmarks", landmarks, "[b m] or [b h m]", (2, 3), below=q.shape[2])
    batch, heads = q.shape[:2]
    if landmarks.shape[0] != batch or each_head(landmarks).shape[1] not in (1, heads):
        raise ValueError(
            f"Expected landmarks [{batch} m] or [{batch} {heads} m], got {tuple(landmarks.shape)}."
        )


def repeated_landmarks(landmarks: Tensor) -> Tensor:
    """Which landmarks stand in their list before: long `[... m]` -> bool `[... m]`."""
    same = landmarks[..., :, None] == landmarks[..., None, :]
    return same.tril(-1).any(-1)


def only_keys(keys: Tensor, bias: Tensor | None) -> Tensor:
    """An `attn_mask` that leaves only keys bool `[b n]` or `[b h n]`, on top of a bias."""
    keep = each_head(keys)[:, :, None]
    return keep if bias is None else bias.masked_fill(~keep, -torch.inf)


def _solve(
    kernel: Tensor,
    values: Tensor,
    solver: str | Callable[[Tensor, Tensor], Tensor],
    iters: int,
    ridge: float,
) -> Tensor:
    if callable(solver):
        return solver(kernel, values)
    if solver == "newton_schulz":
        return newton_schulz(kernel, iters) @ values
    if solver == "ridge":
        return ridge_solve(kernel, values, ridge)
    return torch.linalg.pinv(kernel) @ values
