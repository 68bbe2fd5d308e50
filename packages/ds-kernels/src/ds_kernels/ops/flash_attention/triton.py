"""flash_attention in Triton: forward by tiles of queries; backward by tiles of keys, then by tiles of queries.

All kernels read dense tensors and packed sequences alike: a batch entry is a sequence, which begins at a batch stride
or at `cu_q`/`cu_k`. Two backward kernels instead of atomic sums: gradients are the same bits every time.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._dispatch import interpreting
from ds_kernels._triton import Build, next_power_of_2, type_name
from ds_kernels.ops.flash_attention import reference

__all__ = ["bounds", "builds", "configuration", "dot", "flash_attention", "flash_attention_backward", "hidden"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(interpreting())
"""Triton's interpreter multiplies bf16 as if it were integers: there products take fp32."""


@triton.jit
def dot(a, b):
    """a b in fp32, its operands in their own dtype."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def bounds(first, end, k_len, CAUSAL: tl.constexpr, window, HAS_WINDOW: tl.constexpr):
    """The keys [low, high) that queries at the positions [first, end) see."""
    low = 0
    high = k_len
    if HAS_WINDOW:
        low = tl.maximum(0, first - window + 1)
        if not CAUSAL:
            high = tl.minimum(k_len, end - 1 + window)
    if CAUSAL:
        high = tl.minimum(k_len, end)
    return low, high


@triton.jit
def hidden(position, key, k_len, CAUSAL: tl.constexpr, window, HAS_WINDOW: tl.constexpr):
    """Whether a query at a position does not see a key (broadcast against each other)."""
    # the second term makes the shape that of both; without causality even a query in front of all keys sees them
    if CAUSAL:
        away = (key >= k_len) | (position < -k_len) | (key > position)
    else:
        away = (key >= k_len) | (position != position)
    if HAS_WINDOW:
        away = away | (key <= position - window)
        if not CAUSAL:
            away = away | (key >= position + window)
    return away


@triton.jit
def _extent(cu, batch, length, stride_batch, stride_row, PACKED: tl.constexpr):
    """(offset of the sequence's first element, its length, its first row among all)."""
    if PACKED:
        start = tl.load(cu + batch).to(tl.int64)
        return start * stride_row, (tl.load(cu + batch + 1) - start).to(tl.int32), start
    return batch * stride_batch, length, batch * 0


@triton.jit
def _rows(base, start, stride, line, cols):
    """Pointers to the rows start + line, cols wide: a 64-bit base and 32-bit offsets, for the sake of registers."""
    return (base + (start + tl.zeros((), tl.int64)) * stride) + (line[:, None] * stride + cols[None, :])


@triton.jit
def _forward(
    q, k, v, out, lse, cu_q, cu_k, q_max, k_max, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, o_b, o_h, o_r, l_b, l_h,
    window, scale, group, dim,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_at, q_len, l_at = _extent(cu_q, batch, q_max, q_b, q_r, PACKED)
    k_at, k_len, k_row = _extent(cu_k, batch, k_max, k_b, k_r, PACKED)
    start = tl.program_id(0) * ROWS
    if start >= q_len:
        return
    v_at = k_row * v_r if PACKED else batch * v_b
    o_at = l_at * o_r if PACKED else batch * o_b
    l_at = l_at if PACKED else batch * l_b
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = (rows < q_len)[:, None] & (cols < dim)[None, :]
    line = tl.arange(0, ROWS)
    queries = tl.load(_rows(q + q_at + head * q_h, start, q_r, line, cols), inside, other=0.0)
    k += k_at + head // group * k_h
    v += v_at + head // group * v_h
    first = start + k_len - q_len
    low, high = bounds(first, first + ROWS, k_len, CAUSAL, window, HAS_WINDOW)
    position = rows + k_len - q_len
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    factor = scale * LOG2E
    for block in range(low // KEYS * KEYS, high, KEYS):
        keys = block + tl.arange(0, KEYS)
        there = (keys < k_len)[:, None] & (cols < dim)[None, :]
        columns = tl.load(_rows(k, block, k_r, tl.arange(0, KEYS), cols), there, other=0.0)
        scores = dot(queries, tl.trans(columns)) * factor
        away = hidden(position[:, None], keys[None, :], k_len, CAUSAL, window, HAS_WINDOW)
        scores = tl.where(away, float("-inf"), scores)
        most = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2(highest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(_rows(v, block, v_r, tl.arange(0, KEYS), cols), there, other=0.0)
        sums = sums * shrink[:, None] + dot(weights.to(values.dtype), values)
        highest = most
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(_rows(out + o_at + head * o_h, start, o_r, line, cols), sums.to(out.dtype.element_ty), inside)
    tl.store(lse + l_at + head * l_h + rows, highest * LN2 + tl.log(total), rows < q_len)


@triton.jit
def _delta(
    grad, out, delta, g_b, g_h, g_r, o_b, o_h, o_r, l_b, l_h, length, dim, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """delta = sum over dim of grad * out, per query."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = (rows < length)[:, None] & (cols < dim)[None, :]
    place = rows[:, None].to(tl.int64)
    g = tl.load(grad + batch * g_b + head * g_h + place * g_r + cols[None, :], inside, other=0.0).to(tl.float32)
    o = tl.load(out + batch * o_b + head * o_h + place * o_r + cols[None, :], inside, other=0.0).to(tl.float32)
    tl.store(delta + batch * l_b + head * l_h + rows, tl.sum(g * o, 1), rows < length)


@triton.jit
def _grad_keys(
    grad, q, k, v, lse, delta, grad_k, grad_v, cu_q, cu_k, q_max, k_max,
    g_b, g_h, g_r, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, l_b, l_h, d_b, d_h, d_r, window, scale, group, dim,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (strides d_*) of a tile of keys: a walk over the queries of the group that see it."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_at, q_len, q_row = _extent(cu_q, batch, q_max, q_b, q_r, PACKED)
    k_at, k_len, k_row = _extent(cu_k, batch, k_max, k_b, k_r, PACKED)
    start = tl.program_id(0) * KEYS
    if start >= k_len:
        return
    v_at = k_row * v_r if PACKED else batch * v_b
    d_at = k_row * d_r if PACKED else batch * d_b
    g_at = q_row * g_r if PACKED else batch * g_b
    l_at = q_row if PACKED else batch * l_b
    keys, cols = start + tl.arange(0, KEYS), tl.arange(0, DIM)
    inside = (keys < k_len)[:, None] & (cols < dim)[None, :]
    line = tl.arange(0, KEYS)
    columns = tl.load(_rows(k + k_at + head * k_h, start, k_r, line, cols), inside, other=0.0)
    values = tl.load(_rows(v + v_at + head * v_h, start, v_r, line, cols), inside, other=0.0)
    sum_k, sum_v = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    offset = k_len - q_len
    low = 0
    high = q_len
    if CAUSAL:
        low = tl.maximum(0, start - offset)
    if HAS_WINDOW:
        high = tl.minimum(q_len, start + KEYS - 1 + window - offset)
        if not CAUSAL:
            low = tl.maximum(0, start - window + 1 - offset)
    for member in range(group):
        queries_at = q + q_at + (head * group + member) * q_h
        grads_at = grad + g_at + (head * group + member) * g_h
        stats = l_at + (head * group + member) * l_h
        for block in range(low // ROWS * ROWS, high, ROWS):
            rows = block + tl.arange(0, ROWS)
            there = (rows < q_len)[:, None] & (cols < dim)[None, :]
            queries = tl.load(_rows(queries_at, block, q_r, tl.arange(0, ROWS), cols), there, other=0.0)
            outer = tl.load(_rows(grads_at, block, g_r, tl.arange(0, ROWS), cols), there, other=0.0)
            total = tl.load(lse + stats + rows, rows < q_len, other=float("inf"))
            shift = tl.load(delta + stats + rows, rows < q_len, other=0.0)
            scores = dot(columns, tl.trans(queries)) * scale
            away = hidden((rows + offset)[None, :], keys[:, None], k_len, CAUSAL, window, HAS_WINDOW)
            away = away | (rows >= q_len)[None, :]
            weights = tl.where(away, 0.0, tl.exp2((scores - total[None, :]) * LOG2E))
            sum_v += dot(weights.to(outer.dtype), outer)
            pull = dot(values, tl.trans(outer)) - shift[None, :]
            pull = tl.where(away, 0.0, weights * pull)
            sum_k += dot(pull.to(queries.dtype), queries)
    d_at += head * d_h
    tl.store(_rows(grad_k + d_at, start, d_r, line, cols), (sum_k * scale).to(grad_k.dtype.element_ty), inside)
    tl.store(_rows(grad_v + d_at, start, d_r, line, cols), sum_v.to(grad_v.dtype.element_ty), inside)


@triton.jit
def _grad_queries(
    grad, q, k, v, lse, delta, grad_q, cu_q, cu_k, q_max, k_max,
    g_b, g_h, g_r, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, l_b, l_h, d_b, d_h, d_r, window, scale, group, dim,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """grad_q (strides d_*) of a tile of queries: a walk over the keys that it sees."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_at, q_len, q_row = _extent(cu_q, batch, q_max, q_b, q_r, PACKED)
    k_at, k_len, k_row = _extent(cu_k, batch, k_max, k_b, k_r, PACKED)
    start = tl.program_id(0) * ROWS
    if start >= q_len:
        return
    v_at = k_row * v_r if PACKED else batch * v_b
    d_at = q_row * d_r if PACKED else batch * d_b
    g_at = q_row * g_r if PACKED else batch * g_b
    stats = (q_row if PACKED else batch * l_b) + head * l_h
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = (rows < q_len)[:, None] & (cols < dim)[None, :]
    line = tl.arange(0, ROWS)
    queries = tl.load(_rows(q + q_at + head * q_h, start, q_r, line, cols), inside, other=0.0)
    outer = tl.load(_rows(grad + g_at + head * g_h, start, g_r, line, cols), inside, other=0.0)
    total = tl.load(lse + stats + rows, rows < q_len, other=float("inf"))
    shift = tl.load(delta + stats + rows, rows < q_len, other=0.0)
    k += k_at + head // group * k_h
    v += v_at + head // group * v_h
    position = rows + k_len - q_len
    first = start + k_len - q_len
    low, high = bounds(first, first + ROWS, k_len, CAUSAL, window, HAS_WINDOW)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    for block in range(low // KEYS * KEYS, high, KEYS):
        keys = block + tl.arange(0, KEYS)
        there = (keys < k_len)[:, None] & (cols < dim)[None, :]
        columns = tl.load(_rows(k, block, k_r, tl.arange(0, KEYS), cols), there, other=0.0)
        values = tl.load(_rows(v, block, v_r, tl.arange(0, KEYS), cols), there, other=0.0)
        scores = dot(queries, tl.trans(columns)) * scale
        away = hidden(position[:, None], keys[None, :], k_len, CAUSAL, window, HAS_WINDOW)
        weights = tl.where(away, 0.0, tl.exp2((scores - total[:, None]) * LOG2E))
        pull = dot(outer, tl.trans(values)) - shift[:, None]
        pull = tl.where(away, 0.0, weights * pull)
        sums += dot(pull.to(columns.dtype), columns)
    there = _rows(grad_q + d_at + head * d_h, start, d_r, line, cols)
    tl.store(there, (sums * scale).to(grad_q.dtype.element_ty), inside)


_TILES = {  # (fp32?, kernel, padded dim) -> tile of queries, tile of keys, warps, stages
    (False, "forward", 64): (128, 64, 8, 2),
    (False, "forward", 128): (64, 32, 8, 2),
    (False, "forward", 256): (16, 16, 8, 1),
    (False, "keys", 64): (32, 32, 4, 2),
    (False, "keys", 128): (16, 32, 4, 2),
    (False, "queries", 64): (32, 32, 4, 2),
    (False, "queries", 128): (32, 16, 4, 2),
    (True, "forward", 64): (16, 16, 4, 1),
    (True, "forward", 128): (16, 16, 8, 1),
    (True, "forward", 256): (16, 16, 8, 1),
    (True, "keys", 64): (16, 16, 4, 1),
    (True, "keys", 128): (16, 16, 4, 1),
    (True, "queries", 64): (16, 16, 4, 1),
    (True, "queries", 128): (16, 16, 8, 1),
}
MAX_BACKWARD_DIM = 128
"""Larger heads go backward by the reference: their accumulators do not fit the registers of every target."""


def configuration(dim: int, dtype: torch.dtype, kind: str) -> dict[str, int]:
    """Tile of queries and keys, padded dim, warps and stages: chosen so that no target spills."""
    block = max(16, next_power_of_2(dim))
    rows, keys, warps, stages = _TILES[dtype == torch.float32, kind, min(max(block, 64), 256)]
    return {"ROWS": rows, "KEYS": keys, "DIM": block, "num_warps": warps, "num_stages": stages}


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _batch(q: Tensor, cu_q: Tensor | None) -> int:
    return q.shape[0] if cu_q is None else len(cu_q) - 1


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, which takes fp64 and what is empty."""
    if q.dtype == torch.float64 or not q.numel() or not k.numel():
        return reference.flash_attention(q, k, v, cu_q, cu_k, causal, window, scale)
    out, lse = reference.empty_output(q)
    found = configuration(q.shape[3], q.dtype, "forward")
    _forward[(triton.cdiv(max_q, found["ROWS"]), q.shape[1], _batch(q, cu_q))](
        q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *_strides(q), *_strides(k), *_strides(v), *_strides(out),
        lse.stride(0), lse.stride(1), window, scale, q.shape[1] // k.shape[1], q.shape[3],
        CAUSAL=causal, HAS_WINDOW=window > 0, PACKED=cu_q is not None, **found,
    )  # fmt: skip
    return out, lse


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference, which takes fp64, what is empty, and heads above MAX_BACKWARD_DIM."""
    if q.dtype == torch.float64 or not q.numel() or not k.numel() or q.shape[3] > MAX_BACKWARD_DIM:
        return reference.flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, window, scale)
    grad_q, grad_k, grad_v = (reference.empty_output(x)[0] for x in (q, k, v))
    delta = torch.empty_like(lse)
    by_keys, by_queries = (configuration(q.shape[3], q.dtype, kind) for kind in ("keys", "queries"))
    batch, heads, length, dim = q.shape
    _delta[(triton.cdiv(length, 32), heads, batch)](
        grad, out, delta, *_strides(grad), *_strides(out), lse.stride(0), lse.stride(1), length, dim,
        ROWS=32, DIM=by_keys["DIM"],
    )  # fmt: skip
    strides = (*_strides(grad), *_strides(q), *_strides(k), *_strides(v), lse.stride(0), lse.stride(1))
    rest: dict[str, Any] = {"CAUSAL": causal, "HAS_WINDOW": window > 0, "PACKED": cu_q is not None}
    group = heads // k.shape[1]
    _grad_keys[(triton.cdiv(max_k, by_keys["KEYS"]), k.shape[1], _batch(q, cu_q))](
        grad, q, k, v, lse, delta, grad_k, grad_v, cu_q, cu_k, max_q, max_k,
        *strides, *_strides(grad_k), window, scale, group, dim, **rest, **by_keys,
    )  # fmt: skip
    _grad_queries[(triton.cdiv(max_q, by_queries["ROWS"]), heads, _batch(q, cu_q))](
        grad, q, k, v, lse, delta, grad_q, cu_q, cu_k, max_q, max_k,
        *strides, *_strides(grad_q), window, scale, group, dim, **rest, **by_queries,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _build(kernel: Any, kind: str, tensors: list[str], dtype: torch.dtype, dim: int, **constants: Any) -> Build:
    found = {**configuration(dim, dtype, kind), **constants}
    options = {"num_warps": found.pop("num_warps"), "num_stages": found.pop("num_stages")}
    types = {"lse": "*fp32", "delta": "*fp32", "cu_q": "*i32", "cu_k": "*i32"}
    signature = {each: types.get(each, f"*{type_name(dtype)}") for each in tensors}
    for argument in kernel.arg_names:
        if argument not in signature and argument not in found:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    return Build(kernel, signature, found, **options)


def builds() -> Iterator[Build]:
    """Every tile configuration; windows and packed sequences where the registers are fewest."""
    tensors = ["q", "k", "v", "lse", "cu_q", "cu_k"]
    both = [*tensors, "grad", "delta"]
    kernels = {
        "forward": (_forward, [*tensors, "out"]),
        "keys": (_grad_keys, [*both, "grad_k", "grad_v"]),
        "queries": (_grad_queries, [*both, "grad_q"]),
    }
    for wide, kind, dim in _TILES:
        constants = {"CAUSAL": True, "HAS_WINDOW": dim == 128, "PACKED": dim != 64}
        kernel, arguments = kernels[kind]
        yield _build(kernel, kind, arguments, torch.float32 if wide else torch.bfloat16, dim, **constants)
    signature = {"grad": "*bf16", "out": "*bf16", "delta": "*fp32"}
    signature |= {each: "i32" for each in _delta.arg_names if each not in (*signature, "ROWS", "DIM")}
    yield Build(_delta, signature, {"ROWS": 32, "DIM": MAX_BACKWARD_DIM})
