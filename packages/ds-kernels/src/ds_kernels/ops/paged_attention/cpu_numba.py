"""Decoding in numba: one query per sequence, its keys and values streamed out of the pages once.

An item is (sequence, split): SPLIT keys of a context, all heads of it, because those lie side by side in a page. Keys
and values are walked 16 rows at a time, the next ones fetched ahead (`rows`); the query rows of a group share what they
read. A context of several splits leaves (maximum, sum, unscaled output) per split, merged by `merge`. Splits are of
fixed length, so the number of threads changes no bits.

Pages that are scattered over ordinary 4 KB pages of memory cost more address translations than reading them in order:
where plain reads of random 8 KB reach less than half of the memory's bandwidth, so does this. A cache on huge pages
(THP_MEM_ALLOC_ENABLE=1 lets torch allocate them) is 1.2-1.5 times as fast.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,index"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    f32_array,
    f32_to_bf16,
    float_at,
    grain,
    i32_array,
    i64_array,
    load,
    store,
    take,
    total,
    u8_array,
)
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.rows import AHEAD, KEYS, dots, dots_bf16_pairs, gather, prefetch
from ds_kernels._cpu.tiles import HAS_BF16_DOT, column_exp, column_max

__all__ = [
    "SPLIT", "decode", "dots_bf16", "dots_f32", "dots_fp16", "gather_bf16", "gather_f32", "gather_fp16", "merge",
    "write",
]  # fmt: skip

SPLIT = 256
"""Keys of an item."""
EXTRA = 2
"""Numbers in front of a split's output: the maximum and the sum."""
BF16, FP16 = 1, 2
LOG2E = 1.4426950408889634

_f14, _f24, _f34, _f44 = (gather[0, i, 4] for i in (1, 2, 3, 4))
_f11, _f21, _f31, _f41 = (gather[0, i, 1] for i in (1, 2, 3, 4))
_b14, _b24, _b34, _b44 = (gather[1, i, 4] for i in (1, 2, 3, 4))
_b11, _b21, _b31, _b41 = (gather[1, i, 1] for i in (1, 2, 3, 4))
_h14, _h24, _h34, _h44 = (gather[2, i, 4] for i in (1, 2, 3, 4))
_h11, _h21, _h31, _h41 = (gather[2, i, 1] for i in (1, 2, 3, 4))


def _products(one, two, three, four):
    """The dots of one dtype as a function of the number of rows, over many keys."""

    @njit(inline="never")
    def products(height, keys, out, out_row, query, query_row, table, skip, dim):
        step, far = 4 * KEYS, 8 * KEYS
        for j in range((keys + KEYS - 1) // KEYS):
            if height == 1:
                one(out + j * step, out_row, query, query_row, table + j * far, skip, dim)
            elif height == 2:
                two(out + j * step, out_row, query, query_row, table + j * far, skip, dim)
            elif height == 3:
                three(out + j * step, out_row, query, query_row, table + j * far, skip, dim)
            else:
                four(out + j * step, out_row, query, query_row, table + j * far, skip, dim)

    return products


dots_f32, dots_bf16, dots_fp16 = (_products(*(dots[code, i] for i in (1, 2, 3, 4))) for code in (0, 1, 2))
_dots_pairs = _products(*(dots_bf16_pairs[i] for i in (1, 2, 3, 4))) if HAS_BF16_DOT else dots_bf16


def _chooser(one4, two4, three4, four4, one1, two1, three1, four1):
    """The gathers of one dtype as a function of the number of rows and of vectors."""

    @njit(inline="never")
    def choose(height, width, o, o_row, p, p_row, values, skip, count, first):
        if width == 4:
            if height == 1:
                one4(o, o_row, p, p_row, values, skip, count, first)
            elif height == 2:
                two4(o, o_row, p, p_row, values, skip, count, first)
            elif height == 3:
                three4(o, o_row, p, p_row, values, skip, count, first)
            else:
                four4(o, o_row, p, p_row, values, skip, count, first)
        elif height == 1:
            one1(o, o_row, p, p_row, values, skip, count, first)
        elif height == 2:
            two1(o, o_row, p, p_row, values, skip, count, first)
        elif height == 3:
            three1(o, o_row, p, p_row, values, skip, count, first)
        else:
            four1(o, o_row, p, p_row, values, skip, count, first)

    return choose


gather_f32 = _chooser(_f14, _f24, _f34, _f44, _f11, _f21, _f31, _f41)
gather_bf16 = _chooser(_b14, _b24, _b34, _b44, _b11, _b21, _b31, _b41)
gather_fp16 = _chooser(_h14, _h24, _h34, _h44, _h11, _h21, _h31, _h41)


@njit(inline="always")
def _exp2(x):
    """2^x for x <= 0."""
    return np.float32(np.exp(x * np.float32(0.6931471805599453)))


@njit(inline="never", fastmath=FASTMATH)
def _weights(s, keys, scale, lanes):
    """Scores to weights relative to their maximum; returns the maximum (scaled, to base 2) and the sum.

    lanes: scratch of 48 floats. The row is taken as a matrix of 16 columns, filled up with -inf.
    """
    rows = (keys + 15) // 16
    for j in range(keys, 16 * rows):
        s[j] = np.float32(-np.inf) if scale > 0 else np.float32(np.inf)
    for j in range(16):
        lanes[j] = np.float32(-np.inf)
    at, most = s.ctypes.data, lanes.ctypes.data
    column_max(at, 16, rows, scale, most, most + 64, most + 128)
    highest = np.float32(-np.inf)
    for j in range(16):
        highest = max(highest, lanes[j])
    for j in range(16):
        lanes[j], lanes[16 + j] = highest, np.float32(0.0)
    column_exp(at, 16, rows, most, most + 64, at)
    return highest, lanes[16:32].sum()


@njit(inline="never", fastmath=FASTMATH)
def _scores(code, pairs, s, query, heads, group, keys, k_at, head_bytes, dim):
    """s[h, j] for 16 keys at a time and all heads of them, as they lie in a page (s and query are addresses)."""
    query_row = (2 if pairs else 4) * dim
    for j in range(0, keys, 16):
        count, table = min(16, keys - j), k_at.ctypes.data + 8 * j
        for head in range(heads):
            skip = head * head_bytes
            for h in range(head * group, (head + 1) * group, 4):
                height = min(4, (head + 1) * group - h)
                out, row = s + 4 * (h * SPLIT + j), query + h * query_row
                if pairs:
                    _dots_pairs(height, count, out, 4 * SPLIT, row, query_row, table, skip, dim)
                elif code == BF16:
                    dots_bf16(height, count, out, 4 * SPLIT, row, query_row, table, skip, dim)
                elif code == FP16:
                    dots_fp16(height, count, out, 4 * SPLIT, row, query_row, table, skip, dim)
                else:
                    dots_f32(height, count, out, 4 * SPLIT, row, query_row, table, skip, dim)


@njit(inline="never", fastmath=FASTMATH)
def _outputs(code, o, s, heads, group, keys, v_at, head_bytes, dim):
    """o[h, :] += the weights times the values, for 16 keys at a time and all heads of them; o and s are addresses."""
    for j in range(0, keys, 16):
        count, addresses = min(16, keys - j), v_at.ctypes.data + 8 * j
        for head in range(heads):
            skip = head * head_bytes
            for h in range(head * group, (head + 1) * group, 4):
                height = min(4, (head + 1) * group - h)
                out, weights, first = o + 4 * h * dim, s + 4 * (h * SPLIT + j), 0
                while first < dim:
                    size = 4 if dim - first >= 64 else 1
                    if code == BF16:
                        gather_bf16(height, size, out, dim, weights, SPLIT, addresses, skip, count, first)
                    elif code == FP16:
                        gather_fp16(height, size, out, dim, weights, SPLIT, addresses, skip, count, first)
                    else:
                        gather_f32(height, size, out, dim, weights, SPLIT, addresses, skip, count, first)
                    first += 16 * size


@njit(inline="always")
def _fetch(rows, count, skip, width):
    """Ask for the first rows of one head."""
    for j in range(count):
        for line in range(rows[j] + skip, rows[j] + skip + width, 64):
            prefetch(line)


@njit(inline="never")
def _locate(a, table, start, keys, more, k_at, v_at):
    """The addresses of `keys` rows of keys and values from `start` on, and of `more` behind them, which are only
    prefetched; the last one fills the tables up."""
    size, itemsize = a[15], 4 if a[14] == 0 else 2
    j, place, row = 0, start // size, start % size
    while j < keys + more:
        page = np.int64(table[place])
        if page < 0 or page >= a[16]:
            i64_array(a, 10, 1)[0] = 1
            page = np.int64(0)
        here = min(keys + more - j, size - row)
        k_first = a[4] + itemsize * (page * a[22] + row * a[24])
        v_first = a[5] + itemsize * (page * a[25] + row * a[27])
        for i in range(here):
            k_at[j + i] = k_first + itemsize * i * a[24]
            v_at[j + i] = v_first + itemsize * i * a[27]
        j, place, row = j + here, place + 1, 0
    for i in range(max(j, 1), (keys + 15) // 16 * 16 + AHEAD):
        k_at[i], v_at[i] = k_at[j - 1], v_at[j - 1]


@kernel
def decode(a):
    """Slots: q, k_cache, v_cache, out, partial, block table, sequences, error (int64: set where a page is not there);
    heads, kv_heads, dim, code, page size, pages, window, scale, splits; strides of q (token, head), k (page, head,
    row), v (page, head, row), block table; sequences. `sequences`: (token, context length, table row) each."""
    heads, kv_heads, dim, code = a[11], a[12], a[13], a[14]
    window, scale, splits = a[17], np.float32(float_at(a, 18) * LOG2E), a[19]
    group, itemsize = heads // kv_heads, 4 if code == 0 else 2
    pairs, width = HAS_BF16_DOT and code == BF16 and dim % 32 == 0, dim * itemsize
    records = i64_array(a, 9, 3 * a[29])
    query, query16 = np.empty(heads * dim, np.float32), np.empty(heads * dim, np.uint16)
    s, o = np.empty(heads * SPLIT, np.float32), np.empty(heads * dim, np.float32)
    heights, totals = np.empty(heads, np.float32), np.empty(heads, np.float32)
    k_at, v_at, lanes = np.empty(SPLIT + AHEAD, np.int64), np.empty(SPLIT + AHEAD, np.int64), np.zeros(48, np.float32)
    low = take(a)
    while low < total(a):
        for item in range(low, min(low + grain(a), total(a))):
            index, split = item // splits, item % splits
            token, length, sequence = records[3 * index], records[3 * index + 1], records[3 * index + 2]
            begin = max(0, length - window) if window else 0
            start = begin + split * SPLIT
            if start >= length and split > 0:
                continue
            keys = max(0, min(SPLIT, length - start))
            table = i32_array(a, 8, (sequence + 1) * a[28])[sequence * a[28] :]
            _locate(a, table, start, keys, min(AHEAD, length - start - keys), k_at, v_at)
            for h in range(heads):
                load(a, 3, code, token * a[20] + h * a[21], dim, query[h * dim : (h + 1) * dim])
            if pairs:
                for d in range(heads * dim):
                    query16[d] = f32_to_bf16(query[d])
            source = query16.ctypes.data if pairs else query.ctypes.data
            _scores(code, pairs, s.ctypes.data, source, kv_heads, group, keys, k_at, itemsize * a[23], dim)
            o[:] = np.float32(0.0)
            several = length - begin > SPLIT
            begins, step = (index * heads * splits + split) * (dim + EXTRA), splits * (dim + EXTRA)
            for h in range(heads):
                if h % group == 0:
                    _fetch(v_at, min(16, keys), h // group * itemsize * a[26], width)
                highest, sum_ = _weights(s[h * SPLIT : (h + 1) * SPLIT], keys, scale, lanes)
                heights[h], totals[h] = highest, sum_
            _outputs(code, o.ctypes.data, s.ctypes.data, kv_heads, group, keys, v_at, itemsize * a[26], dim)
            for h in range(heads):
                row = o[h * dim : (h + 1) * dim]
                if several:
                    there = begins + h * step
                    partial = f32_array(a, 7, there + EXTRA + dim)[there:]
                    partial[0], partial[1], partial[EXTRA:] = heights[h], totals[h], row
                else:
                    row *= np.float32(1.0) / totals[h] if totals[h] != 0.0 else np.float32(0.0)
                    store(a, 6, code, (token * heads + h) * dim, dim, row)
        low = take(a)


@kernel
def merge(a):
    """Slots: partial, out, sequences; heads, dim, code, window, splits. Items are (sequence, head)."""
    heads, dim, code, window, splits = a[6], a[7], a[8], a[9], a[10]
    records = i64_array(a, 5, 3 * (total(a) // heads))
    o = np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for item in range(low, min(low + grain(a), total(a))):
            token, length = records[3 * (item // heads)], records[3 * (item // heads) + 1]
            length = min(length, window) if window else length
            if length <= SPLIT:
                continue
            row = token * heads + item % heads
            count = (length + SPLIT - 1) // SPLIT
            width = dim + EXTRA
            partial = f32_array(a, 3, (item + 1) * splits * width)[item * splits * width :]
            highest = partial[0]
            for split in range(1, count):
                highest = max(highest, partial[split * width])
            sum_ = np.float32(0.0)
            o[:] = np.float32(0.0)
            for split in range(count):
                part = partial[split * width : (split + 1) * width]
                weight = _exp2(np.float32(part[0] - highest))
                sum_ += weight * part[1]
                for d in range(dim):
                    o[d] += weight * part[EXTRA + d]
            inverse = np.float32(1.0) / sum_ if sum_ != np.float32(0.0) else np.float32(0.0)
            for d in range(dim):
                o[d] *= inverse
            store(a, 4, code, row * dim, dim, o)
        low = take(a)


@kernel
def write(a):
    """Slots: k, v, k_cache, v_cache, slots (int64), error; kv_heads, bytes of a row, page size, pages; strides in bytes
    of k (token, head), v (token, head), k_cache (page, head, row), v_cache (page, head, row). Items are tokens."""
    kv_heads, width, size, pages = a[9], a[10], a[11], a[12]
    slots = i64_array(a, 7, total(a))
    low = take(a)
    while low < total(a):
        for token in range(low, min(low + grain(a), total(a))):
            slot = slots[token]
            if slot < 0:
                continue
            page, row = slot // size, slot % size
            if page >= pages:
                i64_array(a, 8, 1)[0] = 1
                continue
            for head in range(kv_heads):
                to, of = page * a[17] + head * a[18] + row * a[19], token * a[13] + head * a[14]
                u8_array(a, 5, to + width)[to:] = u8_array(a, 3, of + width)[of:]
                to, of = page * a[20] + head * a[21] + row * a[22], token * a[15] + head * a[16]
                u8_array(a, 6, to + width)[to:] = u8_array(a, 4, of + width)[of:]
        low = take(a)
