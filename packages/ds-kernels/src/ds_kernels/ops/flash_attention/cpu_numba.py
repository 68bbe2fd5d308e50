"""Attention forward in numba: a tile of query rows, its keys by blocks, everything of it in L1 and L2.

A tile holds the rows (position, head of the group) that share one head of keys, along the vector lanes: scores
[keys, rows] = K Q^T and sums [dim, rows] += V^T P are tile products without a transposition of K or V, and the softmax
over keys needs no sums across lanes. K and V come row by row, from dense tensors, packed sequences or pages of a cache,
into scratch blocks: fp32, or pairs of bf16 where the CPU multiplies those. A tile is computed by one thread, so that
their number changes no bits.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    f32_array,
    f32_to_bf16,
    float_at,
    i32_array,
    i64_array,
    load,
    store,
    take,
    total,
    u16_array,
)
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.tiles import (
    HAS_BF16_DOT,
    LANES,
    column_exp,
    column_exp_pairs,
    column_max,
    tile_bf16,
    tile_f32,
)

__all__ = ["BLOCK", "FIELDS", "forward"]

BLOCK = 64
"""Keys of a block."""
FIELDS = 9
"""Numbers per sequence: first tile, first element of q, out, lse, k and v, queries, keys, row in the block table."""
STRIP = 32
"""Rows come in multiples of what one tile product holds."""
BF16 = 1
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@njit(inline="never", fastmath=FASTMATH)
def _mask(s, first, keys, rows, scale, low, high):
    """Scale the scores, and set those of keys outside [low, high) of their row to -inf."""
    for i in range(keys):
        row = s[i * rows : (i + 1) * rows]
        key = np.int32(first + i)
        for r in range(rows):
            row[r] = row[r] * scale if low[r] <= key < high[r] else np.float32(-np.inf)


@njit(inline="never")
def _interleave(to, values, dim, odd):
    """Put 16-bit values into the lower halves (clearing the upper ones), or the upper halves."""
    if odd:
        for d in range(dim):
            to[d] |= np.uint32(values[d]) << np.uint32(16)
    else:
        for d in range(dim):
            to[d] = np.uint32(values[d])


@njit(inline="never", fastmath=FASTMATH)
def _shrink(o, dims, rows, by):
    for d in range(dims):
        row = o[d * rows : (d + 1) * rows]
        for r in range(rows):
            row[r] *= by[r]


@njit(inline="never", fastmath=FASTMATH)
def _products(pairs, c, rows, a, a_row, a_k, b, height, depth):
    """c[height, rows] += a b, with addresses; heights are multiples of ROWS, rows of STRIP, depth in elements."""
    for column in range(0, rows, STRIP):
        for i in range(0, height, 8):
            place, left, right = c + 4 * (i * rows + column), a + 4 * i * a_row, b + 4 * column
            if HAS_BF16_DOT and pairs:
                tile_bf16(place, rows, left, a_row, a_k, right, rows, depth // 2)
            else:
                tile_f32(place, rows, left, a_row, a_k, right, rows, depth)


@njit(inline="never", fastmath=FASTMATH)
def _softmax(pairs, s, p, keys, rows, scale, m, sums, by):
    """Scores (addresses) to weights in p, fp32 or pairs; the running maximum m, the sums, and by what those shrink."""
    for strip in range(0, rows, LANES):
        skip = 4 * strip
        column_max(s + skip, rows, keys, scale, m + skip, sums + skip, by + skip)
        if HAS_BF16_DOT and pairs:
            column_exp_pairs(s + skip, rows, keys, m + skip, sums + skip, p + skip)
        else:
            column_exp(s + skip, rows, keys, m + skip, sums + skip, p + skip)


@njit(inline="always")
def _place(a, j, start, head_stride, row_stride, page_stride, head, table):
    """The element at which the row of key j begins; a[27] is the page size, 0 for dense keys."""
    if a[27] == 0:
        return start + head * head_stride + j * row_stride
    return table[j // a[27]] * page_stride + head * head_stride + (j % a[27]) * row_stride


@njit(inline="never", fastmath=FASTMATH)
def _read_queries(a, record, head, first, used, rows, qt, qt16, low, high, line):
    """Queries across the lanes of qt, and the keys [low, high) that each sees; returns (begin, end), what one of them
    sees, and (all_from, all_to), what all of them see."""
    group, dim, code, causal, window = a[11] // a[12], a[13], a[14], a[15], a[16]
    q_len, k_len = record[6], record[7]
    pairs = HAS_BF16_DOT and code == BF16
    qt[: (dim + 7) // 8 * 8 * rows] = np.float32(0.0)
    low[:rows] = high[:rows] = np.int32(0)
    begin, end, all_from, all_to = k_len, 0, 0, k_len
    for r in range(used):
        query = first + r // group
        load(a, 3, code, record[1] + (head * group + r % group) * a[18] + query * a[19], dim, line)
        if pairs:
            for d in range(dim):
                qt16[((d // 2) * rows + r) * 2 + d % 2] = f32_to_bf16(line[d])
        else:
            for d in range(dim):
                qt[d * rows + r] = line[d]
        position = query + k_len - q_len
        last = position + 1 if causal else (position + window if window else k_len)
        own_low, own_high = max(0, position - window + 1) if window else 0, max(0, min(k_len, last))
        low[r], high[r] = np.int32(own_low), np.int32(own_high)
        begin, end = min(begin, own_low), max(end, own_high)
        all_from, all_to = max(all_from, own_low), min(all_to, own_high)
    return begin, end, all_from, all_to


@njit(inline="never", fastmath=FASTMATH)
def _read_keys(a, record, head, start, keys, height, kb, kb16, vb, vb32, table):
    """Keys and values from `start` on, into their blocks; rows behind them are cleared, as 0 times NaN is NaN."""
    dim, code = a[13], a[14]
    wide = (dim + 7) // 8 * 8
    pairs = HAS_BF16_DOT and code == BF16
    for i in range(keys):
        k_at = _place(a, start + i, record[4], a[20], a[21], a[28], head, table)
        v_at = _place(a, start + i, record[5], a[22], a[23], a[29], head, table)
        if pairs:
            kb16[i * wide : i * wide + dim] = u16_array(a, 4, k_at + dim)[k_at:]
            _interleave(vb32[(i // 2) * wide :], u16_array(a, 5, v_at + dim)[v_at:], dim, i % 2)
        else:
            load(a, 4, code, k_at, dim, kb[i * wide : i * wide + dim])
            load(a, 5, code, v_at, dim, vb[i * wide : i * wide + dim])
    for i in range(keys, height):
        if not pairs:
            vb[i * wide : i * wide + dim] = np.float32(0.0)
        elif i % 2 == 0:
            vb32[(i // 2) * wide : (i // 2 + 1) * wide] = np.uint32(0)


@njit(inline="never", fastmath=FASTMATH)
def _write_rows(a, record, head, first, used, rows, o, m, sums, line):
    """The outputs and log-sum-exps of a tile."""
    heads, group, dim, code = a[11], a[11] // a[12], a[13], a[14]
    lse = f32_array(a, 7, record[3] + (heads - 1) * a[26] + record[6])
    for r in range(used):
        own, query = head * group + r % group, first + r // group
        inverse = np.float32(1.0) / sums[r] if sums[r] != 0.0 else np.float32(0.0)
        for d in range(dim):
            line[d] = o[d * rows + r] * inverse
        store(a, 6, code, record[2] + own * a[24] + query * a[25], dim, line)
        lse[record[3] + own * a[26] + query] = np.float32(m[r] * LN2 + np.log(sums[r]))


@njit(inline="always")
def _has_pages(a, table, begin, end):
    """Whether the pages of keys [begin, end) are in the cache."""
    for place in range(begin // a[27], (end - 1) // a[27] + 1):
        if table[place] < 0 or table[place] >= a[32]:
            return False
    return True


@kernel
def forward(a):
    """Slots: q, k, v, out, lse, sequences, block table; sequences, heads, kv_heads, dim, code, causal, window, scale;
    strides of q (head, row), k (head, row), v (head, row), out (head, row), lse (head); page size; strides of pages
    of k and v and of the table's rows; queries per tile; pages in the cache. Items are tiles. A page that is not in the
    cache sets the number behind the records, and its tile is left undone."""
    num, group, dim, width = a[10], a[11] // a[12], a[13], a[31]
    scale = np.float32(float_at(a, 17) * LOG2E)
    wide, most = (dim + 7) // 8 * 8, (width * group + STRIP - 1) // STRIP * STRIP
    pairs = HAS_BF16_DOT and a[14] == BF16
    records = i64_array(a, 8, num * FIELDS + 1)
    qt, kb, vb = (
        np.zeros(wide * most, np.float32),
        np.zeros(BLOCK * wide, np.float32),
        np.zeros(BLOCK * wide, np.float32),
    )
    qt16, kb16, vb32 = qt.view(np.uint16), kb.view(np.uint16), vb.view(np.uint32)
    s, o, line = np.empty(BLOCK * most, np.float32), np.empty(wide * most, np.float32), np.empty(dim, np.float32)
    m, sums, by = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.float32)
    low, high = np.empty(most, np.int32), np.empty(most, np.int32)
    table = i32_array(a, 9, 1)
    item = take(a)
    while item < total(a):
        index = 0
        while index + 1 < num and records[(index + 1) * FIELDS] <= item:
            index += 1
        record = records[index * FIELDS : (index + 1) * FIELDS]
        tiles = (record[6] + width - 1) // width
        inside = item - record[0]
        head, first = inside // tiles, (tiles - 1 - inside % tiles) * width  # the longest rows of keys first
        used = min(width, record[6] - first) * group
        rows = (used + STRIP - 1) // STRIP * STRIP
        begin, end, all_from, all_to = _read_queries(a, record, head, first, used, rows, qt, qt16, low, high, line)
        if a[27] != 0:
            table = i32_array(a, 9, (record[8] + 1) * a[30])[record[8] * a[30] :]
            if begin < end and not _has_pages(a, table, begin, end):
                records[num * FIELDS], end = 1, begin
        m[:rows], sums[:rows], o[: wide * rows] = np.float32(-np.inf), np.float32(0.0), np.float32(0.0)
        for start in range(begin, end, BLOCK):
            keys = min(BLOCK, end - start)
            height = (keys + 7) // 8 * 8
            _read_keys(a, record, head, start, keys, height, kb, kb16, vb, vb32, table)
            s[: height * rows] = np.float32(0.0)
            k_row = wide // 2 if pairs else wide
            _products(pairs, s.ctypes.data, rows, kb.ctypes.data, k_row, 1, qt.ctypes.data, height, wide)
            factor = scale
            if start < all_from or start + height > all_to:
                _mask(s, start, height, rows, scale, low, high)
                factor = np.float32(1.0)
            _softmax(pairs, s.ctypes.data, s.ctypes.data, height, rows, factor,
                     m.ctypes.data, sums.ctypes.data, by.ctypes.data)  # fmt: skip
            _shrink(o, wide, rows, by)
            _products(pairs, o.ctypes.data, rows, vb.ctypes.data, 1, wide, s.ctypes.data, wide, height)
        _write_rows(a, record, head, first, used, rows, o, m, sums, line)
        item = take(a)
