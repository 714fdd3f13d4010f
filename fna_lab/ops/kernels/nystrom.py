"""The two long products of the Nystroem chain in Triton kernels.

`attend_few` is softmax(s Qp K') V for few queries and many keys: a flash kernel over blocks of K
and V, with the keys dealt out to several programs whose parts are put together by their
log-sum-exp. `attend_to_few` is softmax(s Q Kp') V' for many queries and few keys: Kp and V' are
read once by each program and stay on chip while it goes through its blocks of queries.

Either takes a mask that is alike for all queries: which keys may be attended to, or a bias of each
key. It is read once where keys are, and costs one multiply-add a logit.

Both read their inputs in the host's strides, add up in float32, and write `[b h n d]` as a view of
`[b n h d]`, so that the host merges its heads without a copy. float32 is multiplied in three TF32
products, which keep its precision, or in one where PyTorch is told to use TF32.

Source: Dao et al. 2022 (FlashAttention); Dao et al. 2023 (Flash-Decoding, the split over keys).
"""

# Kernels are functions of another language: launched by [grid], with options beside arguments.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fna_lab.ops.kernels.shapes import empty_output, mask_of_keys

# Programs that fill a large GPU about twice (H100: 132 multiprocessors), and blocks of keys that
# are worth a program of their own.
PROGRAMS = 264
LEAST_BLOCKS = 4
LOG2_E = tl.constexpr(1.4426950408889634)


def attend_few(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float
) -> Tensor:
    """Attention of few queries to many keys, softmax(scale q k') v.

    Args:
        q: queries `[b h m d]`.
        k: keys `[b h n d]`.
        v: values `[b h n e]`.
        attn_mask: of each key, `[b h 1 n]`, or 1 in place of b and of h: bool, True = may be
            attended to; or float16, bfloat16 or float32, added to the logits, -inf = may not be.
            None = all may. Rows without a key get zeros.
        scale: factor of the logits.

    Returns:
        `[b h m e]`, a view of `[b m h e]`.
    """
    return _attend_few(q, k, v, mask_of_keys(attn_mask, k), scale)


def attend_to_few(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float
) -> Tensor:
    """Attention of many queries to few keys, softmax(scale q k') v.

    Args:
        q: queries `[b h n d]`.
        k: keys `[b h m d]`; they stay on chip where they fit, see `resident`, and are else read
            in blocks.
        v: values `[b h m e]`.
        attn_mask: of each key, `[b h 1 m]`, or 1 in place of b and of h: bool, True = may be
            attended to; or float16, bfloat16 or float32, added to the logits, -inf = may not be.
            None = all may. Rows without a key get zeros.
        scale: factor of the logits.

    Returns:
        `[b h n e]`, a view of `[b n h e]`.
    """
    if not resident(k.shape[2], k.shape[3], v.shape[3], q.dtype):
        return _attend_few(q, k, v, mask_of_keys(attn_mask, k), scale)
    return _attend_to_few(q, k, v, mask_of_keys(attn_mask, k), scale)


@torch.library.custom_op("fna_lab::attend_few", mutates_args=())
def _attend_few(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, scale: float) -> Tensor:
    batch, heads, marks, width = q.shape
    size, value_width = v.shape[2:]
    out = empty_output(q, v)
    meta = few_blocks(marks, width, value_width, q.dtype)
    rows = triton.cdiv(marks, meta["BLOCK_M"])
    blocks = triton.cdiv(size, meta["BLOCK_N"])
    parts = max(min(PROGRAMS // (batch * heads * rows), blocks // LEAST_BLOCKS, 64), 1)
    span = triton.cdiv(blocks, parts) * meta["BLOCK_N"]
    parts = triton.cdiv(size, span)
    partial = weight = None
    if parts > 1:
        partial = q.new_empty((batch * heads, parts, marks, value_width), dtype=torch.float32)
        weight = q.new_empty((batch * heads, parts, marks), dtype=torch.float32)
    with torch.cuda.device_of(q):
        few_queries[(batch * heads, rows, parts)](
            q, k, v, keys, out, partial, weight,
            *q.stride(), *k.stride(), *v.stride(), *_strides(keys), *out.stride(),
            heads, marks, size, width, value_width, scale * LOG2_E.value, span,
            PARTS=parts > 1, **_products(q.dtype), **meta,
        )  # fmt: skip
        if parts > 1:
            put_together[(batch * heads, triton.cdiv(marks, 16))](
                partial, weight, out, *out.stride(), heads, marks, value_width, parts,
                PART_SLOTS=triton.next_power_of_2(parts), BLOCK_M=16,
                BLOCK_E=meta["BLOCK_E"], num_warps=4,
            )  # fmt: skip
    return out


@torch.library.custom_op("fna_lab::attend_to_few", mutates_args=())
def _attend_to_few(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, scale: float) -> Tensor:
    batch, heads, size, width = q.shape
    marks, value_width = v.shape[2:]
    out = empty_output(q, v)
    meta = many_blocks(marks, width, value_width, q.dtype)
    blocks = triton.cdiv(size, meta["BLOCK_N"])
    # As many blocks a program as leave four programs for each that runs at a time.
    rounds = max(min(batch * heads * blocks // (4 * PROGRAMS), 8), 1)
    span = rounds * meta["BLOCK_N"]
    with torch.cuda.device_of(q):
        many_queries[(batch * heads, triton.cdiv(size, span))](
            q, k, v, keys, out,
            *q.stride(), *k.stride(), *v.stride(), *_strides(keys), *out.stride(),
            heads, size, marks, width, value_width, scale * LOG2_E.value, span,
            **_products(q.dtype), **meta,
        )  # fmt: skip
    return out


@_attend_few.register_fake
@_attend_to_few.register_fake
def _(q, k, v, keys, scale):  # noqa: ARG001
    return empty_output(q, v)


def _strides(keys: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if keys is None else keys.stride()


def _products(dtype: torch.dtype) -> dict[str, str | bool]:
    """How matrices are multiplied; Triton's interpreter lacks bfloat16 (its issue 4972)."""
    interpreted = not isinstance(few_queries, triton.JITFunction)
    return {
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        "WIDEN": interpreted and dtype == torch.bfloat16,
    }


def resident(marks: int, width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether so many keys and values fit into 99 KiB of shared memory beside the queries.

    128 of head dim 128 in 16 bits; 64 of head dim 64, or 32 of 128, in float32.
    """
    if dtype == torch.float32:
        return marks <= 64 and _block(marks) * max(_block(width), _block(value_width)) <= 4096
    return marks <= 128


# Block sizes hold for 99 KiB of shared memory (what every GPU since Ampere gives to one program; a
# test compiles them and looks) and, as ptxas said of sm_80 and sm_90, spill next to no registers.


def few_blocks(marks: int, width: int, value_width: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of `few_queries`."""
    wide = dtype == torch.float32
    block_d, block_e = _block(width), _block(value_width)
    return {
        "BLOCK_M": min(_block(marks), 32 if wide else 64),
        "BLOCK_N": 32 if wide else 64,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "num_warps": 4,
        "num_stages": 1 if wide and max(block_d, block_e) > 64 else 2,
    }


def many_blocks(marks: int, width: int, value_width: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of `many_queries`."""
    wide = dtype == torch.float32
    return {
        "BLOCK_M": _block(marks),
        "BLOCK_N": 32 if wide else 64,
        "BLOCK_D": _block(width),
        "BLOCK_E": _block(value_width),
        "num_warps": 4,
        "num_stages": 1 if wide else 2,
    }


def _block(size: int) -> int:
    """The least power of two that holds `size` and that a matrix product takes."""
    return max(triton.next_power_of_2(size), 16)


@triton.jit
def read(base, rows, columns, stride_row, stride_column, last_row, last_column):
    """A block of a matrix, zero outside."""
    place = base + rows[:, None] * stride_row + columns[None, :] * stride_column
    inside = (rows[:, None] < last_row) & (columns[None, :] < last_column)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Matrix product in float32; `WIDEN` for the interpreter, which has none of bfloat16."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def key_bias(keys, columns, stride, last):
    """What the mask adds to the logits of a block of keys, to base 2; -inf outside."""
    there = columns < last
    if keys is None:
        bias = tl.where(there, 0.0, float("-inf"))
    elif keys.dtype.element_ty.is_floating():
        bias = tl.load(keys + columns * stride, mask=there, other=float("-inf"))
        bias = bias.to(tl.float32) * LOG2_E
    else:
        kept = tl.load(keys + columns * stride, mask=there, other=0)
        bias = tl.where(kept != 0, 0.0, float("-inf"))
    return bias[None, :]


@triton.jit
def few_queries(
    q, k, v, keys, out, partial, weight,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    keys_b, keys_h, keys_n, o_b, o_h, o_n, o_d,
    heads, marks, size, width, value_width, scale, span,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of queries against a span of keys; `scale` holds log2(e)."""
    pair = tl.program_id(0)
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    if keys is not None:
        keys += b * keys_b + h * keys_h
    query = read(q + b * q_b + h * q_h, rows, d, q_n, q_d, marks, width)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last = tl.minimum(part * span + span, size)
    for begin in range(part * span, last, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        bias = key_bias(keys, columns, keys_n, last)
        key = read(k, columns, d, k_n, k_d, last, width)
        value = read(v, columns, e, v_n, v_d, last, value_width)
        logits = multiply(query, tl.trans(key), PRECISION, WIDEN) * scale + bias
        higher = tl.maximum(top, tl.max(logits, 1))
        # Rows that met no key yet: -inf from -inf would give NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - level)
        weights = tl.exp2(logits - level[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums += multiply(weights.to(value.dtype), value, PRECISION, WIDEN)
        top = higher
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    inside = (rows[:, None] < marks) & (e[None, :] < value_width)
    if PARTS:
        place = pair.to(tl.int64) * tl.num_programs(2) + part
        tl.store(weight + place * marks + rows, top + tl.log2(total), mask=rows < marks)
        place = partial + (place * marks + rows[:, None]) * value_width + e[None, :]
        tl.store(place, sums, mask=inside)
    else:
        place = out + b * o_b + h * o_h + rows[:, None] * o_n + e[None, :] * o_d
        tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def put_together(
    partial, weight, out, o_b, o_h, o_n, o_d, heads, marks, value_width, parts,
    PART_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The parts of `few_queries`, weighted by their log-sum-exp (to base 2)."""
    pair = tl.program_id(0)
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    base = pair.to(tl.int64) * parts
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < marks
    slots = tl.arange(0, PART_SLOTS)
    e = tl.arange(0, BLOCK_E)
    every = tl.load(
        weight + (base + slots[:, None]) * marks + rows[None, :],
        mask=(slots[:, None] < parts) & there[None, :],
        other=float("-inf"),
    )
    top = tl.max(every, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(every - top[None, :]), 0)
    inside = there[:, None] & (e[None, :] < value_width)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for part in range(parts):
        line = (base + part) * marks + rows
        share = tl.exp2(tl.load(weight + line, mask=there, other=float("-inf")) - top)
        place = partial + line[:, None] * value_width + e[None, :]
        sums += share[:, None] * tl.load(place, mask=inside, other=0.0)
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    place = out + b * o_b + h * o_h + rows[:, None] * o_n + e[None, :] * o_d
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def many_queries(
    q, k, v, keys, out,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    keys_b, keys_h, keys_n, o_b, o_h, o_n, o_d,
    heads, size, marks, width, value_width, scale, span,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A span of queries against all of few keys, which stay; `scale` holds log2(e)."""
    pair = tl.program_id(0)
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_M)
    q += b * q_b + h * q_h
    out += b * o_b + h * o_h
    if keys is not None:
        keys += b * keys_b + h * keys_h
    bias = key_bias(keys, columns, keys_n, marks)
    key = tl.trans(read(k + b * k_b + h * k_h, columns, d, k_n, k_d, marks, width))
    value = read(v + b * v_b + h * v_h, columns, e, v_n, v_d, marks, value_width)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, size), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        query = read(q, rows, d, q_n, q_d, size, width)
        logits = multiply(query, key, PRECISION, WIDEN) * scale + bias
        top = tl.max(logits, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logits - top[:, None])
        total = tl.sum(weights, 1)
        sums = multiply(weights.to(value.dtype), value, PRECISION, WIDEN)
        sums = sums / tl.where(total == 0, 1.0, total)[:, None]
        place = out + rows[:, None] * o_n + e[None, :] * o_d
        inside = (rows[:, None] < size) & (e[None, :] < value_width)
        tl.store(place, sums.to(out.dtype.element_ty), mask=inside)
