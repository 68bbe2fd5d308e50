"""Stages of decode that read weights: activations are packed by every thread for itself, weight rows handed out.

An item is some rows of a projection (layout.PER_ITEM); all blocks of activation rows pass over it while it is in the
cache. Packed blocks: dense weights take what `vector` describes, quantised ones digits of 8 bits and facts
(`ops.linear.cpu_numba`), `planes` of them per activation: 2 hold 15 bits and a sign, 2^-16 of a group's largest value.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,no-any-return,index"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_at, i32_at, i64_at, load_at
from ds_kernels._cpu.maths import tanh
from ds_kernels._cpu.team import clear_next, share, take_from
from ds_kernels.ops.decode import layout as at
from ds_kernels.ops.decode.vector import rows_product
from ds_kernels.ops.linear.cpu_numba import pack_row
from ds_kernels.ops.linear.packing import copy_line
from ds_kernels.ops.linear.vector import panel_dot

__all__ = ["block_of", "pack", "product"]

PANEL = 16
BF16 = 1
AHEAD = 8192
"""Bytes of dense weights that are prefetched ahead."""


@njit(inline="always")
def block_of(rows):
    """Activation rows that one pass takes: 1, 2, 4 or 8."""
    return 1 if rows <= 1 else 2 if rows <= 2 else 4 if rows <= 4 else 8


@njit(cache=True, inline="never")
def _pack_dense(code, values, columns, block, row, to):
    """One row among its block's chunks of 32 columns; values are filled up with zeros to a whole chunk."""
    chunks = (columns + 31) // 32
    source = f32_at(values, chunks * 32)
    if code == BF16:
        for c in range(chunks):
            target = f32_at(to + 128 * (c * block + row), 32)
            for i in range(16):
                target[i] = source[32 * c + 2 * i]
            for i in range(16):
                target[16 + i] = source[32 * c + 2 * i + 1]
    else:
        for c in range(chunks):
            target = f32_at(to + 128 * (c * block + row), 32)
            for i in range(32):
                target[i] = source[32 * c + i]


@njit(cache=True, inline="never")
def pack(p, values, row, block, planes, prepared, block_nbytes):
    """Prepare one activation row for the projection at p; values: address of its columns, zeros behind them."""
    record = i64_at(p, at.PROJECTION)
    kind, columns, depth, group = record[at.KIND], record[at.COLUMNS], record[at.DEPTH], record[at.GROUP]
    to, place = prepared + row // block * block_nbytes, row % block
    if kind < 4:
        _pack_dense(kind, values, columns, block, place, to)
        return
    facts = to + depth * block * planes
    count = (depth + group - 1) // group * block * (planes + 2)
    amounts = np.empty(4, np.int32)
    middle = np.int64(128 if kind == 8 else 8)
    pack_row(
        values, depth, group, block, place, planes, middle, to, i32_at(facts, count), f32_at(facts, count), amounts
    )
    amounts[0] = 0  # numba frees an array after its last use by name


def _rows_of(code):
    """The products of one dtype as a function of the block: `rows_product` takes both as literals."""

    @njit(cache=True, inline="never")
    def rows_of(block, weight, stride, count, x, columns, out, width):
        if block == 1:
            for i in range(0, count, 8):
                n = min(8, count - i)
                rows_product(code, 1, weight + i * stride, stride, n, AHEAD, x, columns, out + 4 * i, width)
        elif block == 2:
            for i in range(0, count, 8):
                n = min(8, count - i)
                rows_product(code, 2, weight + i * stride, stride, n, AHEAD, x, columns, out + 4 * i, width)
        elif block == 4:
            for i in range(0, count, 4):
                n = min(4, count - i)
                rows_product(code, 4, weight + i * stride, stride, n, AHEAD, x, columns, out + 4 * i, width)
        else:
            for i in range(0, count, 2):
                n = min(2, count - i)
                rows_product(code, 8, weight + i * stride, stride, n, AHEAD, x, columns, out + 4 * i, width)

    return rows_of


_dense_f32, _dense_bf16, _dense_fp16 = (_rows_of(code) for code in (0, 1, 2))


def _panels_of(bits, planes, centred):
    """The products of one format as a function of the block: `panel_dot` takes all of them as literals."""

    @njit(cache=True, inline="never")
    def panels_of(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes):
        for p in range((count + PANEL - 1) // PANEL):
            c, s, m = codes + p * depth * 2 * bits, scale + p * groups * 2 * PANEL, centre + p * groups * 2 * PANEL
            if block == 1:
                panel_dot(bits, 1, planes, centred, c, s, m, x, facts, groups, depth, group, results + 64 * p)
            else:
                if block == 2:
                    panel_dot(bits, 2, planes, centred, c, s, m, x, facts, groups, depth, group, lanes)
                elif block == 4:
                    panel_dot(bits, 4, planes, centred, c, s, m, x, facts, groups, depth, group, lanes)
                else:
                    panel_dot(bits, 8, planes, centred, c, s, m, x, facts, groups, depth, group, lanes)
                for row in range(block):
                    copy_line(lanes + 64 * row, results + row * width + 64 * p)

    return panels_of


_int8_1, _int8_2, _int4_1, _int4_2 = (_panels_of(bits, planes, 0) for bits in (8, 4) for planes in (1, 2))
_int8_1c, _int8_2c, _int4_1c, _int4_2c = (_panels_of(bits, planes, 1) for bits in (8, 4) for planes in (1, 2))


@njit(cache=True, inline="never")
def _panels(record, start, count, block, planes, x, results, width):
    """Rows [start, start + count) of a quantised projection; start is a multiple of 16. lanes: behind the results."""
    bits, depth, group, centred = record[at.KIND], record[at.DEPTH], record[at.GROUP], record[at.CENTRE] != 0
    groups, first = (depth + group - 1) // group, start // PANEL
    codes, scale = record[at.WEIGHT] + first * depth * 2 * bits, record[at.SCALE] + first * groups * 2 * PANEL
    centre = record[at.CENTRE] + first * groups * 2 * PANEL
    facts, lanes = x + depth * block * planes, results + 9 * width
    if bits == 8 and planes == 1 and not centred:
        _int8_1(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 8 and planes == 1 and centred:
        _int8_1c(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 8 and planes == 2 and not centred:
        _int8_2(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 8 and planes == 2 and centred:
        _int8_2c(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 4 and planes == 1 and not centred:
        _int4_1(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 4 and planes == 1 and centred:
        _int4_1c(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    elif bits == 4 and planes == 2 and not centred:
        _int4_2(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)
    else:
        _int4_2c(block, codes, scale, centre, count, x, facts, groups, depth, group, results, width, lanes)


@njit(cache=True, inline="never")
def _dense(record, start, count, block, x, out, width):
    kind, columns = record[at.KIND], record[at.COLUMNS]
    stride = columns * (4 if kind == 0 else 2)
    weight = record[at.WEIGHT] + start * stride
    if kind == BF16:
        _dense_bf16(block, weight, stride, count, x, columns, out, width)
    elif kind == 0:
        _dense_f32(block, weight, stride, count, x, columns, out, width)
    else:
        _dense_fp16(block, weight, stride, count, x, columns, out, width)


@njit(cache=True, inline="never")
def _finish(record, start, count, rows, first, results, width, softcap, out, out_width):
    """An item's results of one block of rows, with bias and softcap, to where they belong."""
    shift = f32_at(results + width * 8, count)
    if record[at.BIAS]:
        code = record[at.BIAS_CODE]
        load_at(record[at.BIAS] + start * (4 if code == 0 else 2), code, count, shift)
    for row in range(rows):
        values = f32_at(results + row * width, count)
        target = f32_at(out + 4 * ((first + row) * out_width + start), count)
        if record[at.BIAS]:
            for i in range(count):
                target[i] = values[i] + shift[i]
        else:
            for i in range(count):
                target[i] = values[i]
        if softcap != np.float32(0.0):
            inverse = np.float32(1.0) / softcap
            for i in range(count):
                target[i] = softcap * tanh(np.float32(target[i] * inverse))


@njit(cache=True, inline="never")
def product(p, rows, block, planes, prepared, block_nbytes, results, width, softcap, out, hands, size, stage, index):
    """out[rows, outputs] (address, fp32) = what was packed times the projection at p, by all threads of the team.

    results: address of scratch of nine rows of `width` bytes: an item's results, and its biases.
    """
    record = i64_at(p, at.PROJECTION)
    outputs, per = record[at.OUTPUTS], record[at.PER_ITEM]
    items = (outputs + per - 1) // per
    clear_next(hands, size, stage, index)
    for turn in range(size):
        owner = (index + turn) % size
        first, last = share(items, size, owner)
        item = first + take_from(hands, size, stage, owner)
        while item < last:
            start = item * per
            count = min(per, outputs - start)
            for block_first in range(0, rows, block):
                x = prepared + block_first // block * block_nbytes
                if record[at.KIND] < 4:
                    _dense(record, start, count, block, x, results, width)
                else:
                    _panels(record, start, count, block, planes, x, results, width)
                _finish(
                    record, start, count, min(block, rows - block_first), block_first, results, width, softcap, out,
                    outputs,
                )  # fmt: skip
            item = first + take_from(hands, size, stage, owner)
