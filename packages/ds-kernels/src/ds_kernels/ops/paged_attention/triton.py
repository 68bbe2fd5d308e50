"""paged_attention in Triton: tiles of query rows against pages; a call of one query each is split over the context.

The rows of a tile are (query, head of the group) pairs, so the heads that share keys read them once. Splits leave their
unscaled sums, maximum and sum, which `_merge` puts together. A GPU cannot say that a page is outside the cache: such a
page, and what is behind a context's block table, must not occur.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2, type_name
from ds_kernels.ops.flash_attention.triton import bounds, dot, hidden
from ds_kernels.ops.paged_attention import reference

__all__ = ["builds", "paged_attention", "write_kv"]

LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 16
SPLIT = 512
"""Keys that a split has at least, as far as the block table's width tells."""


@triton.jit
def _attend(
    q, k_cache, v_cache, out, partial, tables, lengths, cu_q,
    q_t, q_h, k_p, k_h, k_r, v_p, v_h, v_r, t_s, heads, window, scale, group, dim, splits,
    HAS_WINDOW: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    sequence = tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_q + sequence).to(tl.int64)
    q_len = (tl.load(cu_q + sequence + 1) - begin).to(tl.int32)
    k_len = tl.load(lengths + sequence).to(tl.int32)
    start = tl.program_id(0) * ROWS
    if start >= q_len * group:
        return
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, DIM)
    query, member = rows // group, rows % group
    inside = (rows < q_len * group)[:, None] & (cols < dim)[None, :]
    token = begin + query
    place = token * q_t + (head * group + member).to(tl.int64) * q_h
    queries = tl.load(q + place[:, None] + cols[None, :], inside, other=0.0)
    position = query + k_len - q_len
    first, last = start // group + k_len - q_len, (start + ROWS - 1) // group + 1 + k_len - q_len
    low, high = bounds(first, tl.minimum(last, k_len), k_len, True, window, HAS_WINDOW)
    low = low // KEYS * KEYS
    if SPLITS:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), KEYS) * KEYS
        low += split * share
        high = tl.minimum(high, low + share)
    table = tables + sequence * t_s
    k_cache += head.to(tl.int64) * k_h
    v_cache += head.to(tl.int64) * v_h
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    factor = scale * LOG2E
    for block in range(low, high, KEYS):
        keys = block + tl.arange(0, KEYS)
        there = keys < k_len
        page = tl.load(table + keys // PAGE, there, other=0).to(tl.int64)
        filled = there[:, None] & (cols < dim)[None, :]
        columns = tl.load(k_cache + (page * k_p + keys % PAGE * k_r)[:, None] + cols[None, :], filled, other=0.0)
        scores = dot(queries, tl.trans(columns)) * factor
        away = hidden(position[:, None], keys[None, :], k_len, True, window, HAS_WINDOW)
        scores = tl.where(away, float("-inf"), scores)
        most = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2(highest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_cache + (page * v_p + keys % PAGE * v_r)[:, None] + cols[None, :], filled, other=0.0)
        sums = sums * shrink[:, None] + dot(weights.to(values.dtype), values)
        highest = most
    row = token * heads + head * group + member
    if SPLITS:
        place = (row * splits + split) * (dim + 2)
        tl.store(partial + place, highest, rows < q_len * group)
        tl.store(partial + place + 1, total, rows < q_len * group)
        tl.store(partial + place[:, None] + 2 + cols[None, :], sums, inside)
    else:
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * dim + cols[None, :], sums.to(out.dtype.element_ty), inside)


@triton.jit
def _merge(partial, out, dim, splits, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """One row of the output from its splits."""
    row, cols, each = tl.program_id(0).to(tl.int64), tl.arange(0, DIM), tl.arange(0, SPLITS)
    place = (row * splits + each) * (dim + 2)
    highest = tl.load(partial + place, each < splits, other=float("-inf"))
    total = tl.load(partial + place + 1, each < splits, other=0.0)
    most = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(most == float("-inf"), 0.0, most))
    whole = tl.sum(total * weight, 0)
    inside = (each < splits)[:, None] & (cols < dim)[None, :]
    sums = tl.load(partial + place[:, None] + 2 + cols[None, :], inside, other=0.0)
    found = tl.sum(sums * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * dim + cols, found.to(out.dtype.element_ty), cols < dim)


@triton.jit
def _write(
    k, v, k_cache, v_cache, slots, k_t, k_h, v_t, v_h, kc_p, kc_h, kc_r, vc_p, vc_h, vc_r, size, dim, DIM: tl.constexpr
):
    """One head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, DIM)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    inside = cols < dim
    page, row = slot // size, slot % size
    keys = tl.load(k + token * k_t + head * k_h + cols, inside)
    values = tl.load(v + token * v_t + head * v_h + cols, inside)
    tl.store(k_cache + page * kc_p + head * kc_h + row * kc_r + cols, keys.to(k_cache.dtype.element_ty), inside)
    tl.store(v_cache + page * vc_p + head * vc_h + row * vc_r + cols, values.to(v_cache.dtype.element_ty), inside)


def _configuration(dim: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Tile of query rows (as few as fit) and keys, padded dim, warps and stages: chosen so that no target spills."""
    block = max(16, next_power_of_2(dim))
    if dtype == torch.float32 or block > 128:
        return {"ROWS": 16, "KEYS": 16, "DIM": block, "num_warps": 4, "num_stages": 1}
    most = min(32, max(16, next_power_of_2(rows)))
    return {"ROWS": most, "KEYS": 32, "DIM": block, "num_warps": most // 4, "num_stages": 2}


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    cu_q: Tensor, max_q: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """As the reference, which takes fp64 and what is empty."""
    if q.dtype == torch.float64 or not q.numel() or not k_cache.numel() or not block_tables.numel():
        return reference.paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_q, window, scale)
    tokens, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    group, table = heads // kv_heads, block_tables.to(torch.int32).contiguous()
    found = _configuration(dim, q.dtype, max_q * group)
    capacity = table.shape[1] * page
    splits = max(1, min(MAX_SPLITS, (min(capacity, window or capacity)) // SPLIT)) if max_q == 1 else 1
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    partial = q.new_zeros(tokens * heads * splits * (dim + 2) if splits > 1 else 0, dtype=torch.float32)
    grid = (triton.cdiv(max_q * group, found["ROWS"]), kv_heads * splits, len(context_lens))
    _attend[grid](
        q, k_cache, v_cache, out, partial, table, context_lens, cu_q, q.stride(0), q.stride(1),
        *k_cache.stride()[:3], *v_cache.stride()[:3], table.stride(0), heads, window, scale, group, dim, splits,
        HAS_WINDOW=window > 0, SPLITS=splits > 1, PAGE=page, **found,
    )  # fmt: skip
    if splits > 1:
        _merge[(tokens * heads,)](partial, out, dim, splits, SPLITS=MAX_SPLITS, DIM=found["DIM"])
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As the reference, which takes fp64."""
    if torch.float64 in (k.dtype, k_cache.dtype):
        reference.write_kv(k, v, k_cache, v_cache, slots)
    elif k.numel():
        _write[k.shape[:2]](
            k, v, k_cache, v_cache, slots.contiguous(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache.shape[2], k.shape[2], DIM=next_power_of_2(k.shape[2]),
        )  # fmt: skip


def builds() -> Iterator[Build]:
    """Decoding and chunks at usual head dimensions and the largest."""
    for dtype, dim, rows, splits, window in (
        (torch.bfloat16, 64, 3, True, False),
        (torch.bfloat16, 128, 512, False, True),
        (torch.bfloat16, 256, 512, True, False),
        (torch.float32, 128, 512, True, False),
    ):
        found = _configuration(dim, dtype, rows)
        options = {"num_warps": found.pop("num_warps"), "num_stages": found.pop("num_stages")}
        constants = {**found, "HAS_WINDOW": window, "SPLITS": splits, "PAGE": 16}
        signature = dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{type_name(dtype)}")
        signature |= {"partial": "*fp32", "tables": "*i32", "lengths": "*i32", "cu_q": "*i32", "scale": "fp32"}
        signature |= {each: "i32" for each in _attend.arg_names if each not in signature and each not in constants}
        yield Build(_attend, signature, constants, **options)
    signature = {"partial": "*fp32", "out": "*bf16", "dim": "i32", "splits": "i32"}
    yield Build(_merge, signature, {"SPLITS": MAX_SPLITS, "DIM": 256})
    tensors = dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16") | {"slots": "*i64"}
    rest = {each: "i32" for each in _write.arg_names if each not in tensors and each != "DIM"}
    yield Build(_write, tensors | rest, {"DIM": 128})
