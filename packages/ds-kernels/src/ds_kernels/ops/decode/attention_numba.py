"""Attention of decode: an item is (sequence, head of the cache, split of the context), its queries a group of heads.

The item with a context's last split normalises, turns and writes the new key and value; nobody else reads them. Splits
leave (maximum, sum, unscaled output) per head, put together by `mixed` in the next stage.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,no-any-return,index"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_at, float_at, i32_at, i64_at, load_at, store_at
from ds_kernels._cpu.launch import step
from ds_kernels._cpu.maths import exp, tanh
from ds_kernels._cpu.rows import AHEAD
from ds_kernels._cpu.team import clear_next, invoke, share, take_from
from ds_kernels.ops.decode import layout as at
from ds_kernels.ops.decode.vector import square_sum, value_sum
from ds_kernels.ops.paged_attention.cpu_numba import (
    dots_bf16,
    dots_f32,
    dots_fp16,
    gather_bf16,
    gather_f32,
    gather_fp16,
)

__all__ = ["ATTEND", "attention", "mixed", "norm"]

BF16, FP16 = 1, 2
EXTRA = 2


@njit(cache=True, inline="never")
def norm(record_at, x, count, out, shift):
    """out = norm of x (addresses of fp32, `count` long; both have room up to a multiple of 16, x zeros there).

    shift: scratch of as many floats.
    """
    record = i64_at(record_at, at.NORM)
    padded = (count + 15) // 16 * 16
    source, target, by = f32_at(x, padded), f32_at(out, padded), f32_at(shift, padded)
    eps, offset = float_at(record, at.NORM_EPS), np.float32(float_at(record, at.NORM_OFFSET))
    middle = np.float32(0.0)
    if record[at.NORM_KIND] == at.LAYER_NORM:
        middle = np.float32(value_sum(x, count) / np.float32(count))
    for i in range(count):
        target[i] = source[i] - middle
    for i in range(count, padded):
        target[i] = np.float32(0.0)
    mean = np.float64(square_sum(out, count)) / np.float64(count)
    factor = np.float32(1.0 / np.sqrt(mean + eps))
    load_at(record[at.NORM_WEIGHT], record[at.NORM_CODE], count, by)
    for i in range(count):
        target[i] = target[i] * factor * (by[i] + offset)
    if record[at.NORM_BIAS]:
        load_at(record[at.NORM_BIAS], record[at.NORM_BIAS_CODE], count, by)
        for i in range(count):
            target[i] += by[i]


@njit(cache=True, inline="always")
def _splits(length, window):
    """Of a context: the first key that is seen, keys of a split, splits."""
    seen = min(length, window) if window else length
    span = at.SPAN * ((seen + at.SPAN * at.MAX_SPLITS - 1) // (at.SPAN * at.MAX_SPLITS))
    span = max(span, at.SPAN)
    return length - seen, span, max(1, (seen + span - 1) // span)


@njit(cache=True, inline="never")
def _turn(layer, position, x):
    """Rotate a head's row (fp32 at an address) by its position."""
    width = layer[at.ROPE_WIDTH]
    if width == 0:
        return
    row = f32_at(x, 2 * width)
    cos, sin = f32_at(layer[at.COS] + 4 * position * width, width), f32_at(layer[at.SIN] + 4 * position * width, width)
    for i in range(width):
        low, high = row[i], row[width + i]
        row[i] = low * cos[i] - high * sin[i]
        row[width + i] = high * cos[i] + low * sin[i]


@njit(cache=True, inline="never")
def _head(layer, norm_at, position, source, dim, to, scratch):
    """A query or key head: copied, normalised over its features, turned."""
    padded = (dim + 15) // 16 * 16
    values, target = f32_at(source, dim), f32_at(to, padded)
    for i in range(dim):
        target[i] = values[i]
    for i in range(dim, padded):
        target[i] = np.float32(0.0)
    if i64_at(norm_at, at.NORM)[at.NORM_KIND] != at.NONE:
        norm(norm_at, to, dim, scratch, scratch + 4 * padded)
        normed = f32_at(scratch, dim)
        for i in range(dim):
            target[i] = normed[i]
    _turn(layer, position, to)


@njit(cache=True, inline="never")
def _locate(a, layer, table, head, start, keys, k_at, v_at):
    """The addresses of `keys` rows of keys and values from `start` on; the last one fills the tables up."""
    size, j = a[at.PAGE_SIZE], 0
    place, row = start // size, start % size
    while j < keys:
        page = np.int64(table[place])
        here = min(keys - j, size - row)
        k_first = layer[at.K_CACHE] + page * layer[at.K_PAGE] + head * layer[at.K_HEAD] + row * layer[at.K_ROW]
        v_first = layer[at.V_CACHE] + page * layer[at.V_PAGE] + head * layer[at.V_HEAD] + row * layer[at.V_ROW]
        for i in range(here):
            k_at[j + i] = k_first + i * layer[at.K_ROW]
            v_at[j + i] = v_first + i * layer[at.V_ROW]
        j, place, row = j + here, place + 1, 0
    for i in range(max(j, 1), (keys + 15) // 16 * 16 + AHEAD):
        k_at[i], v_at[i] = k_at[j - 1], v_at[j - 1]


@njit(cache=True, inline="never")
def _plain_dots(code, count, height, query, dim, k_at, s, s_row, row):
    """Scores where the dim is no multiple of 16; row: scratch."""
    for j in range(count):
        load_at(k_at[j], code, dim, row)
        for h in range(height):
            q = f32_at(query + 4 * h * dim, dim)
            total = np.float32(0.0)
            for d in range(dim):
                total += q[d] * row[d]
            f32_at(s + s_row * h, count)[j] = total


@njit(cache=True, inline="never")
def _plain_gather(code, count, height, o, dim, v_at, s, s_row, row):
    """Outputs where the dim is no multiple of 16."""
    for j in range(count):
        load_at(v_at[j], code, dim, row)
        for h in range(height):
            weight = f32_at(s + s_row * h, count)[j]
            target = f32_at(o + 4 * h * dim, dim)
            for d in range(dim):
                target[d] += weight * row[d]


def _products(dots, gather):
    """Scores and outputs of many keys for the query heads of a group, over caches of one dtype."""

    @njit(inline="never")
    def scores(count, height, query, dim, k_at, s, s_row):
        table = k_at.ctypes.data
        for h in range(0, height, 4):
            dots(min(4, height - h), count, s + s_row * h, s_row, query + 4 * h * dim, 4 * dim, table, 0, dim)

    @njit(inline="never")
    def outputs(count, height, o, dim, v_at, s, s_row):
        table = v_at.ctypes.data
        for h in range(0, height, 4):
            n, out, weights, first = min(4, height - h), o + 4 * h * dim, s + s_row * h, 0
            while first < dim:
                width = 4 if dim - first >= 64 else 1
                gather(n, width, out, dim, weights, s_row // 4, table, 0, count, first)
                first += 16 * width

    return scores, outputs


_scores_f32, _outputs_f32 = _products(dots_f32, gather_f32)
_scores_bf16, _outputs_bf16 = _products(dots_bf16, gather_bf16)
_scores_fp16, _outputs_fp16 = _products(dots_fp16, gather_fp16)


@njit(cache=True, inline="never")
def _weigh(s, count, scale, cap):
    """Scores of one head to weights relative to their maximum; returns the maximum and the sum."""
    row = f32_at(s, count)
    if cap != np.float32(0.0):
        inner = np.float32(scale / cap)
        for j in range(count):
            row[j] = cap * tanh(np.float32(row[j] * inner))
    else:
        for j in range(count):
            row[j] *= scale
    highest = np.float32(-np.inf)
    for j in range(count):
        highest = max(highest, row[j])
    total = np.float32(0.0)
    base = highest if highest > np.float32(-np.inf) else np.float32(0.0)
    for j in range(count):
        row[j] = exp(np.float32(row[j] - base))
    for j in range(count):
        total += row[j]
    return highest, total


@njit(cache=True, inline="never")
def _write(a, layer, row, head, slot, position, k_from, v_from, scratch):
    """The new key and value of one head, from what the projection gave."""
    dim, code = a[at.DIM], a[at.CACHE_CODE]
    _head(layer, layer.ctypes.data + 8 * at.KEY_NORM, position, k_from, dim, scratch, scratch + 8 * (dim + 16))
    if slot < 0:
        return
    page, place = slot // a[at.PAGE_SIZE], slot % a[at.PAGE_SIZE]
    to = layer[at.K_CACHE] + page * layer[at.K_PAGE] + head * layer[at.K_HEAD] + place * layer[at.K_ROW]
    store_at(to, code, dim, f32_at(scratch, dim))
    to = layer[at.V_CACHE] + page * layer[at.V_PAGE] + head * layer[at.V_HEAD] + place * layer[at.V_ROW]
    store_at(to, code, dim, f32_at(v_from, dim))


@njit(cache=True, inline="never")
def _copy(source, target, count):
    """Floats from one address to another."""
    values, places = f32_at(source, count), f32_at(target, count)
    for i in range(count):
        places[i] = values[i]


@njit(cache=True, inline="never")
def _queries(layer, position, source, group, dim, query, scratch):
    """The query heads of a group, normalised and turned, one after the other; and zeros for their outputs behind."""
    padded, outputs = (dim + 15) // 16 * 16, f32_at(query + 4 * (group * dim + 16), group * dim)
    for h in range(group):
        norm_at = layer.ctypes.data + 8 * at.QUERY_NORM
        _head(layer, norm_at, position, source + 4 * h * dim, dim, scratch, scratch + 4 * padded)
        _copy(scratch, query + 4 * h * dim, dim)
    for i in range(group * dim):
        outputs[i] = np.float32(0.0)


def _attend(code):
    """The step of an item, over caches of a dtype: the branches of the others are not compiled."""

    @step
    def attend(slots_at, layer_at, row, head, split, begin, span, length, scratch):
        """One split of one sequence's context for the query heads that share a head of the cache."""
        a, layer = i64_at(slots_at, at.SLOTS_END), i64_at(layer_at, at.LAYER)
        heads, kv_heads, dim = a[at.HEADS], a[at.KV_HEADS], a[at.DIM]
        group, width = heads // kv_heads, dim + EXTRA
        position = i64_at(a[at.POSITIONS], row + 1)[row]
        source = a[at.QKV_OUT] + 4 * row * (heads + 2 * kv_heads) * dim
        start = begin + split * span
        keys = max(0, min(span, length - start))
        s_row = 4 * (a[at.SPAN_MAX] + 16)
        query, o = scratch, scratch + 4 * (group * dim + 16)
        s = o + 4 * (group * dim + 16)
        tables = s + group * s_row
        entries = a[at.SPAN_MAX] + 16 + AHEAD
        k_at, v_at, more = i64_at(tables, entries), i64_at(tables + 8 * entries, entries), tables + 16 * entries
        if start + span >= length:
            slot = i64_at(a[at.SLOTS], row + 1)[row]
            at_k = source + 4 * (heads + head) * dim
            _write(a, layer, row, head, slot, position, at_k, at_k + 4 * kv_heads * dim, more)
        _queries(layer, position, source + 4 * head * group * dim, group, dim, query, more)
        if keys:
            table = i32_at(a[at.TABLES] + 4 * row * a[at.PAGES_WIDTH], a[at.PAGES_WIDTH])
            _locate(a, layer, table, head, start, keys, k_at, v_at)
            if dim % 16:
                _plain_dots(code, keys, group, query, dim, k_at, s, s_row, f32_at(more, dim))
            elif code == BF16:
                _scores_bf16(keys, group, query, dim, k_at, s, s_row)
            elif code == FP16:
                _scores_fp16(keys, group, query, dim, k_at, s, s_row)
            else:
                _scores_f32(keys, group, query, dim, k_at, s, s_row)
        scale = np.float32(float_at(a, at.SCALE_OF_SCORES))
        cap = np.float32(float_at(a, at.ATTENTION_SOFTCAP))
        for h in range(group):
            highest, total = _weigh(s + h * s_row, keys, scale, cap)
            place = ((row * heads + head * group + h) * at.MAX_SPLITS + split) * width
            partial = f32_at(a[at.PARTIALS] + 4 * place, width)
            partial[0], partial[1] = highest, total
        if keys:
            if dim % 16:
                _plain_gather(code, keys, group, o, dim, v_at, s, s_row, f32_at(more, dim))
            elif code == BF16:
                _outputs_bf16(keys, group, o, dim, v_at, s, s_row)
            elif code == FP16:
                _outputs_fp16(keys, group, o, dim, v_at, s, s_row)
            else:
                _outputs_f32(keys, group, o, dim, v_at, s, s_row)
        for h in range(group):
            place = ((row * heads + head * group + h) * at.MAX_SPLITS + split) * width
            _copy(o + 4 * h * dim, a[at.PARTIALS] + 4 * (place + EXTRA), dim)

    return attend


ATTEND = {code: _attend(code) for code in (0, BF16, FP16)}
"""Steps by the dtype code of the caches."""


@njit(cache=True, inline="never")
def attention(a, layer, scratch, hands, size, stage, index):
    """All items of a layer, by all threads of the team; layer: array of its words."""
    rows, kv_heads, window = a[at.ROWS], a[at.KV_HEADS], layer[at.WINDOW]
    lengths = i32_at(a[at.LENGTHS], rows)
    items = 0
    for row in range(rows):
        _begin, _span, splits = _splits(np.int64(lengths[row]), window)
        items += splits * kv_heads
    clear_next(hands, size, stage, index)
    for turn in range(size):
        owner = (index + turn) % size
        first, last = share(items, size, owner)
        item = first + take_from(hands, size, stage, owner)
        while item < last:
            row, rest = 0, item
            begin, span, splits = _splits(np.int64(lengths[0]), window)
            while rest >= splits * kv_heads:
                rest -= splits * kv_heads
                row += 1
                begin, span, splits = _splits(np.int64(lengths[row]), window)
            head, split = rest % kv_heads, rest // kv_heads
            length = np.int64(lengths[row])
            invoke(a[at.ATTEND], (a[at.SELF], layer.ctypes.data, row, head, split, begin, span, length, scratch))
            item = first + take_from(hands, size, stage, owner)


@njit(cache=True, inline="never")
def mixed(a, layer, row, out):
    """out[heads * dim] (address, fp32): the splits of one sequence put together."""
    heads, dim = a[at.HEADS], a[at.DIM]
    _begin, _span, splits = _splits(np.int64(i32_at(a[at.LENGTHS], row + 1)[row]), layer[at.WINDOW])
    width = dim + EXTRA
    for h in range(heads):
        parts = f32_at(a[at.PARTIALS] + 4 * (row * heads + h) * at.MAX_SPLITS * width, splits * width)
        target = f32_at(out + 4 * h * dim, dim)
        highest = parts[0]
        for split in range(1, splits):
            highest = max(highest, parts[split * width])
        base = highest if highest > np.float32(-np.inf) else np.float32(0.0)
        total = np.float32(0.0)
        for d in range(dim):
            target[d] = np.float32(0.0)
        for split in range(splits):
            part = parts[split * width : (split + 1) * width]
            weight = exp(np.float32(part[0] - base))
            total += weight * part[1]
            for d in range(dim):
                target[d] += weight * part[EXTRA + d]
        inverse = np.float32(1.0) / total if total != np.float32(0.0) else np.float32(0.0)
        for d in range(dim):
            target[d] *= inverse
