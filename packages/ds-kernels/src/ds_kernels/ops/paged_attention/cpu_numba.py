"""Decoding in numba: one query per sequence, its keys and values streamed out of the pages once, at memory bandwidth.

An item is (sequence, head of keys, split): SPLIT keys of a context. The group's query rows share each key while it is in
registers or L1. A context of several splits leaves (maximum, sum, unscaled output) per split, merged by `merge`.
Splits are of fixed length, so the number of threads changes no bits.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,index"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    as_float,
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
from ds_kernels._cpu.rows import dots, dots_bf16_pairs, gather
from ds_kernels._cpu.tiles import HAS_BF16_DOT

__all__ = ["SPLIT", "decode", "merge", "write"]

SPLIT = 256
"""Keys of an item."""
EXTRA = 2
"""Numbers in front of a split's output: the maximum and the sum."""
BF16, FP16 = 1, 2
LOG2E = 1.4426950408889634

_dots_f32, _dots_bf16, _dots_fp16 = dots[0], dots[1], dots[2]
_f14, _f24, _f34, _f44 = (gather[0, i, 4] for i in (1, 2, 3, 4))
_f11, _f21, _f31, _f41 = (gather[0, i, 1] for i in (1, 2, 3, 4))
_b14, _b24, _b34, _b44 = (gather[1, i, 4] for i in (1, 2, 3, 4))
_b11, _b21, _b31, _b41 = (gather[1, i, 1] for i in (1, 2, 3, 4))
_h14, _h24, _h34, _h44 = (gather[2, i, 4] for i in (1, 2, 3, 4))
_h11, _h21, _h31, _h41 = (gather[2, i, 1] for i in (1, 2, 3, 4))


def _chooser(one4, two4, three4, four4, one1, two1, three1, four1):
    """The gathers of one dtype as a function of the number of rows and of vectors."""

    @njit(inline="never")
    def choose(height, width, o, o_row, p, p_row, values, count, first):
        if width == 4:
            if height == 1:
                one4(o, o_row, p, p_row, values, count, first)
            elif height == 2:
                two4(o, o_row, p, p_row, values, count, first)
            elif height == 3:
                three4(o, o_row, p, p_row, values, count, first)
            else:
                four4(o, o_row, p, p_row, values, count, first)
        elif height == 1:
            one1(o, o_row, p, p_row, values, count, first)
        elif height == 2:
            two1(o, o_row, p, p_row, values, count, first)
        elif height == 3:
            three1(o, o_row, p, p_row, values, count, first)
        else:
            four1(o, o_row, p, p_row, values, count, first)

    return choose


_gather_f32 = _chooser(_f14, _f24, _f34, _f44, _f11, _f21, _f31, _f41)
_gather_bf16 = _chooser(_b14, _b24, _b34, _b44, _b11, _b21, _b31, _b41)
_gather_fp16 = _chooser(_h14, _h24, _h34, _h44, _h11, _h21, _h31, _h41)


@njit(inline="always")
def _exp2(x):
    """2^x for x <= 0, relative error 3e-9 and fp32's rounding; zero below the normal numbers."""
    low = x < np.float32(-126.0)
    x = np.float32(-126.0) if low else x
    whole = np.int32(x - np.float32(0.5))  # towards zero: the nearest, as x is not positive
    f = np.float32(x - np.float32(whole))
    y = np.float32(0.00015461444724808513)
    y = np.float32(y * f + np.float32(0.0013400428177711937))
    y = np.float32(y * f + np.float32(0.00961805667843204))
    y = np.float32(y * f + np.float32(0.05550327226669895))
    y = np.float32(y * f + np.float32(0.24022650922289554))
    y = np.float32(y * f + np.float32(0.6931472067028329))
    y = np.float32(y * f + np.float32(1.0))
    value = np.float32(y * as_float(np.uint32(np.uint32(whole + np.int32(127)) << np.uint32(23))))
    return np.float32(0.0) if low else value


@njit(inline="never", fastmath=FASTMATH)
def _weights(s, keys, scale):
    """Scores to weights relative to their maximum; returns the maximum (scaled, to base 2) and the sum."""
    highest = np.float32(-np.inf)
    for j in range(keys):
        s[j] = s[j] * scale
        highest = s[j] if s[j] > highest else highest
    if highest == np.float32(-np.inf):
        highest = np.float32(0.0)
    sum_ = np.float32(0.0)
    for j in range(keys):
        s[j] = _exp2(s[j] - highest)
        sum_ += s[j]
    return highest, sum_


@njit(inline="never", fastmath=FASTMATH)
def _scores(code, pairs, s, query, group, keys, addresses, dim):
    """s[g, j] for 16 keys at a time; all but s are addresses."""
    for j in range(0, keys, 16):
        for g in range(group):
            out = s + 4 * (g * SPLIT + j)
            if HAS_BF16_DOT and pairs:
                dots_bf16_pairs(out, query + 2 * g * dim, addresses + 8 * j, dim)
            elif code == BF16:
                _dots_bf16(out, query + 4 * g * dim, addresses + 8 * j, dim)
            elif code == FP16:
                _dots_fp16(out, query + 4 * g * dim, addresses + 8 * j, dim)
            else:
                _dots_f32(out, query + 4 * g * dim, addresses + 8 * j, dim)


@njit(inline="never", fastmath=FASTMATH)
def _outputs(code, o, s, group, keys, addresses, dim):
    """o[g, :] += the weights times the values; o, s and addresses are addresses."""
    for g in range(0, group, 4):
        height = min(4, group - g)
        out, weights, first = o + 4 * g * dim, s + 4 * g * SPLIT, 0
        while first < dim:
            width = 4 if dim - first >= 64 else 1
            if code == BF16:
                _gather_bf16(height, width, out, dim, weights, SPLIT, addresses, keys, first)
            elif code == FP16:
                _gather_fp16(height, width, out, dim, weights, SPLIT, addresses, keys, first)
            else:
                _gather_f32(height, width, out, dim, weights, SPLIT, addresses, keys, first)
            first += 16 * width


@kernel
def decode(a):
    """Slots: q, k_cache, v_cache, out, partial, block table, sequences, error (int64: set where a page is not there);
    heads, kv_heads, dim, code, page size, pages, window, scale, splits; strides of q (token, head), k (page, head,
    row), v (page, head, row), block table; number of sequences. `sequences` holds (token, context length, table row)."""
    heads, kv_heads, dim, code, size, pages = a[11], a[12], a[13], a[14], a[15], a[16]
    window, scale, splits = a[17], np.float32(float_at(a, 18) * LOG2E), a[19]
    group, itemsize = heads // kv_heads, 4 if code == 0 else 2
    pairs = HAS_BF16_DOT and code == BF16 and dim % 32 == 0
    records = i64_array(a, 9, 3 * a[29])
    query, query16 = np.empty(group * dim, np.float32), np.empty(group * dim, np.uint16)
    s, o = np.empty(group * SPLIT, np.float32), np.empty(group * dim, np.float32)
    k_at, v_at = np.empty(SPLIT, np.int64), np.empty(SPLIT, np.int64)
    low = take(a)
    while low < total(a):
        for item in range(low, min(low + grain(a), total(a))):
            index, head, split = item // (kv_heads * splits), item // splits % kv_heads, item % splits
            token, length, place = records[3 * index], records[3 * index + 1], records[3 * index + 2]
            begin = max(0, length - window) if window else 0
            start = begin + split * SPLIT
            if start >= length and split > 0:
                continue
            keys = max(0, min(SPLIT, length - start))
            table = i32_array(a, 8, (place + 1) * a[28])[place * a[28] :]
            for j in range(keys):
                page = np.int64(table[(start + j) // size])
                if page < 0 or page >= pages:
                    i64_array(a, 10, 1)[0] = 1
                    page = 0
                row = (start + j) % size
                k_at[j] = a[4] + itemsize * (page * a[22] + head * a[23] + row * a[24])
                v_at[j] = a[5] + itemsize * (page * a[25] + head * a[26] + row * a[27])
            for j in range(keys, (keys + 15) // 16 * 16):
                k_at[j] = k_at[keys - 1]
            for g in range(group):
                line = query[g * dim : (g + 1) * dim]
                load(a, 3, code, token * a[20] + (head * group + g) * a[21], dim, line)
                if pairs:
                    for d in range(dim):
                        query16[g * dim + d] = f32_to_bf16(line[d])
            source = query16.ctypes.data if pairs else query.ctypes.data
            _scores(code, pairs, s.ctypes.data, source, group, keys, k_at.ctypes.data, dim)
            o[:] = np.float32(0.0)
            several = length - begin > SPLIT
            place = ((index * heads + head * group) * splits + split) * (dim + EXTRA)
            for g in range(group):
                highest, sum_ = _weights(s[g * SPLIT : (g + 1) * SPLIT], keys, scale)
                if several:
                    there = place + g * splits * (dim + EXTRA)
                    partial = f32_array(a, 7, there + EXTRA)[there:]
                    partial[0], partial[1] = highest, sum_
                elif sum_ != np.float32(0.0):
                    inverse = np.float32(1.0) / sum_
                    for j in range(keys):
                        s[g * SPLIT + j] *= inverse
            _outputs(code, o.ctypes.data, s.ctypes.data, group, keys, v_at.ctypes.data, dim)
            for g in range(group):
                if several:
                    there = place + g * splits * (dim + EXTRA) + EXTRA
                    f32_array(a, 7, there + dim)[there:] = o[g * dim : (g + 1) * dim]
                else:
                    store(a, 6, code, (token * heads + head * group + g) * dim, dim, o[g * dim : (g + 1) * dim])
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
