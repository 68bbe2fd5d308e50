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
from ds_kernels._cpu.launch import step
from ds_kernels._cpu.maths import tanh
from ds_kernels._cpu.rows import prefetch
from ds_kernels._cpu.team import clear_next, invoke, share, take_from
from ds_kernels.ops.decode import layout as at
from ds_kernels.ops.decode.vector import WEIGHT_ROWS, fold, rows_product
from ds_kernels.ops.linear.cpu_numba import pack_row
from ds_kernels.ops.linear.packing import copy_line
from ds_kernels.ops.linear.vector import panel_dot

__all__ = ["BLOCKS", "DENSE", "PACK", "QUANTISED", "block_of", "product", "warm"]

BLOCKS = (1, 2, 4, 8)
"""Activation rows of a pass over the weights."""
PANEL = 16
BF16 = 1
LINE = 64
AHEAD = 16384
"""Bytes of dense weights that are prefetched ahead."""
TILE_NBYTES = 20480
"""Bytes of activations of a tile of columns."""


@njit(inline="always")
def block_of(rows):
    """Activation rows that one pass takes: 1, 2, 4 or 8."""
    return 1 if rows <= 1 else 2 if rows <= 2 else 4 if rows <= 4 else 8


def _pack_dense(pairs):
    """Packing for dense weights: pairs of bf16 come apart as even and odd columns."""

    @step
    def pack_dense(record_at, values, row, block, planes, prepared, block_nbytes):
        chunks = (i64_at(record_at, at.PROJECTION)[at.COLUMNS] + 31) // 32
        to, place, source = prepared + row // block * block_nbytes, row % block, f32_at(values, chunks * 32)
        for c in range(chunks):
            target = f32_at(to + 128 * (c * block + place), 32)
            if pairs:
                for i in range(16):
                    target[i] = source[32 * c + 2 * i]
                for i in range(16):
                    target[16 + i] = source[32 * c + 2 * i + 1]
            else:
                for i in range(32):
                    target[i] = source[32 * c + i]

    return pack_dense


def _pack_quantised(bits):
    """Packing for quantised weights; see `ops.linear.cpu_numba`."""
    middle = np.int64(1 << (bits - 1))

    @step
    def pack_quantised(record_at, values, row, block, planes, prepared, block_nbytes):
        record = i64_at(record_at, at.PROJECTION)
        depth, group = record[at.DEPTH], record[at.GROUP]
        to = prepared + row // block * block_nbytes
        facts, count = to + depth * block * planes, (depth + group - 1) // group * block * (planes + 2)
        amounts = np.empty(4, np.int32)
        ints, floats = i32_at(facts, count), f32_at(facts, count)
        pack_row(values, depth, group, block, row % block, planes, middle, to, ints, floats, amounts)
        amounts[0] = 0  # numba frees an array after its last use by name

    return pack_quantised


PACK = {0: _pack_dense(0), BF16: _pack_dense(1), 2: _pack_dense(0), 8: _pack_quantised(8), 4: _pack_quantised(4)}
"""Steps by the kind of a weight: prepare one activation row, whose columns are followed by zeros."""


def _dense(code, block):
    """The product of an item of dense weights of a dtype with a block of activation rows.

    Columns are taken in tiles whose activations stay in the first cache while the item's rows pass by; the sums of a
    row wait in memory meanwhile, unfolded, so tiles change no bit.
    """
    most, size = WEIGHT_ROWS[block], 4 if code == 0 else 2
    tile, sums_nbytes = TILE_NBYTES // (4 * block), LINE * WEIGHT_ROWS[block] * block

    @step
    def dense(record_at, start, count, x, results, width):
        columns = i64_at(record_at, at.PROJECTION)[at.COLUMNS]
        stride = columns * size
        weight = i64_at(record_at, at.PROJECTION)[at.WEIGHT] + start * stride
        tiles = (columns + tile - 1) // tile
        sums = results + 9 * width
        for first in range(0, columns, tile):
            part, ahead = min(tile, columns - first), AHEAD if tiles == 1 else 2 * most * stride
            for i in range(0, count, most):
                mine = sums + (i // most * sums_nbytes if tiles > 1 else 0)
                if first == 0:
                    zeros = f32_at(mine, sums_nbytes // 4)
                    for j in range(sums_nbytes // 4):
                        zeros[j] = np.float32(0.0)
                place, n = weight + i * stride + size * first, min(most, count - i)
                rows_product(code, block, place, stride, n, ahead, x + 4 * block * first, part, mine)
                if first + part == columns:
                    fold(block, mine, results + 4 * i, width)

    return dense


def _quantised(bits, planes, centred, block):
    """The product of an item of quantised weights with a block of activation rows; the item starts at a panel."""

    @step
    def quantised(record_at, start, count, x, results, width):
        record = i64_at(record_at, at.PROJECTION)
        depth, group, first, lanes = record[at.DEPTH], record[at.GROUP], start // PANEL, results + 9 * width
        groups, facts = (depth + group - 1) // group, x + depth * block * planes
        for i in range((count + PANEL - 1) // PANEL):
            codes = record[at.WEIGHT] + (first + i) * depth * 2 * bits
            scale = record[at.SCALE] + (first + i) * groups * 2 * PANEL
            centre = record[at.CENTRE] + (first + i) * groups * 2 * PANEL
            panel_dot(bits, block, planes, centred, codes, scale, centre, x, facts, groups, depth, group, lanes)
            for row in range(block):
                copy_line(lanes + 64 * row, results + row * width + 64 * i)

    return quantised


DENSE = {(code, block): _dense(code, block) for code in (0, 1, 2) for block in BLOCKS}
"""Steps by dtype code and block."""
QUANTISED = {
    (bits, planes, centred, block): _quantised(bits, planes, centred, block)
    for bits in (8, 4)
    for planes in (1, 2)
    for centred in (0, 1)
    for block in BLOCKS
}
"""Steps by bits of a code, planes of activations, whether there are centres, and block."""


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
def warm(p, size, index):
    """Ask for the first weights of this thread's share of a projection, while it waits for the stage to begin."""
    record = i64_at(p, at.PROJECTION)
    kind, per = record[at.KIND], record[at.PER_ITEM]
    first, last = share((record[at.OUTPUTS] + per - 1) // per, size, index)
    row = record[at.COLUMNS] * (4 if kind == 0 else 2) if kind < 4 else record[at.DEPTH] * kind // 8
    begin = record[at.WEIGHT] + first * per * row
    for line in range(0, min(AHEAD, (last - first) * per * row), LINE):
        prefetch(begin + line)


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
                invoke(record[at.PRODUCT], (p, start, count, x, results, width))
                _finish(
                    record, start, count, min(block, rows - block_first), block_first, results, width, softcap, out,
                    outputs,
                )  # fmt: skip
            item = first + take_from(hands, size, stage, owner)
