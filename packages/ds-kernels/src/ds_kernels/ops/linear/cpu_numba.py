"""The loops of `linear` around the vector code: activations are packed, panels handed to threads, sums rounded.

Activations as integers: per activation row and group of columns, x = unit * q with q = rint(x / unit), and q is split
into digits of 8 bits with signs, q = d0 + 256 d1 + 65536 d2: the `planes`. One plane is W8A8. Two planes (15 bits and a
sign) err by at most 2^-16 of the group's largest value, 1/128 of what rounding that value to bf16 costs; three planes
by 2^-24, fp32's own rounding of it. Layout, for a block of up to 8 rows: quads of columns, rows, planes, 4 bytes.
Beside them stand facts per group: minus the codes' middle times the sum of every plane (int32: where the sums start),
and per row the unit and the sum of its x (fp32). An infinity or NaN in a group makes its row's results NaN.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,no-any-return"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    as_float,
    bf16_to_f32,
    f32_array,
    grain,
    i32_array,
    load,
    store,
    take,
    total,
    u16_array,
)  # fmt: skip
from ds_kernels._cpu.launch import FASTMATH, Kernel, kernel
from ds_kernels.ops.linear.packing import copy_line, digits, largest_bits, round_lanes
from ds_kernels.ops.linear.vector import LANES, panel_dot, rows_dot

__all__ = ["BF16_ROWS", "QUANTISED", "pack_blocks", "pack_row"]

BF16 = 1
AHEAD = 8192
"""Bytes of bf16 weights that are prefetched ahead: more than memory delivers in its latency while eight rows wait."""


@njit(cache=True, fastmath=FASTMATH)
def pack_row(values, depth, group, block, row, planes, middle, words, ints, floats, amounts):
    """Quantise one row of a block; see the module's text for the layout. values and words are addresses."""
    facts, step = block * (planes + 2), 4 * block * planes
    limit = np.float64(127.0 if planes == 1 else 32639.0 if planes == 2 else 32639.0 * 256)
    for g in range((depth + group - 1) // group):
        first, count = g * group, min(group, depth - g * group)
        part, target = values + 4 * first, words + first // 4 * step + 4 * row * planes
        largest = largest_bits(part, count)
        inverse, unit = np.float32(0.0), np.float32(0.0)
        if largest >= np.uint32(0x7F800000):
            unit = as_float(np.uint32(0x7FC00000))
        elif largest > np.uint32(0):
            inverse = np.float32(min(limit / np.float64(as_float(largest)), 3e38))
            unit = np.float32(np.float64(1.0) / np.float64(inverse))
        if planes == 1:
            digits(1, part, count, inverse, target, step, amounts.ctypes.data)
        elif planes == 2:
            digits(2, part, count, inverse, target, step, amounts.ctypes.data)
        else:
            digits(3, part, count, inverse, target, step, amounts.ctypes.data)
        whole = np.int64(0)
        for plane in range(planes):
            ints[g * facts + row * planes + plane] = np.int32(-middle * amounts[plane])
            whole += np.int64(amounts[plane]) << np.int64(8 * plane)
        floats[g * facts + block * planes + row] = unit
        floats[g * facts + block * (planes + 1) + row] = np.float32(unit * np.float64(whole))


@njit(cache=True, fastmath=FASTMATH)
def _pack_block(a, first, rows, block, planes, middle, columns, depth, group, code, words, ints, floats):
    """Pack activation rows [first, first + block), to the address `words`; rows past the end are zeros."""
    values, amounts = np.zeros(depth, np.float32), np.zeros(4, np.int32)
    for row in range(block):
        if first + row < rows:
            load(a, 3, code, (first + row) * columns, columns, values)
        else:
            values[:] = np.float32(0.0)
        pack_row(values.ctypes.data, depth, group, block, row, planes, middle, words, ints, floats, amounts)
    values[0], amounts[0] = np.float32(0.0), np.int32(0)  # numba frees an array after its last use by name


@kernel
def pack_blocks(a):
    """Slots: x, words, facts, rows, columns, depth, group, block, planes, middle, code. Items are blocks of rows."""
    rows, columns, depth, group, block, planes, middle, code = a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    num_words = depth // 4 * block * planes
    num_facts = (depth + group - 1) // group * block * (planes + 2)
    ints, floats = i32_array(a, 5, total(a) * num_facts), f32_array(a, 5, total(a) * num_facts)
    i = take(a)
    while i < total(a):
        _pack_block(
            a, i * block, rows, block, planes, middle, columns, depth, group, code,
            a[4] + 4 * i * num_words, ints[i * num_facts :], floats[i * num_facts :],
        )  # fmt: skip
        i = take(a)


@njit(cache=True)
def _widen(a, slot, code, start, count, out):
    """`load`, but compiled once, not into every kernel."""
    load(a, slot, code, start, count, out)


@njit(cache=True)
def _finish(a, sums, shift, code, first, rows, outputs, column, count):
    """Add the bias to a block's sums over one panel and round them into y (slot 8)."""
    size = 4 if code == 0 else 2
    for row in range(rows):
        if count == LANES:
            at, plus = sums.ctypes.data + 4 * LANES * row, shift.ctypes.data
            there = a[8] + size * ((first + row) * outputs + column)
            if code == 0:
                round_lanes(0, at, plus, there)
            elif code == 1:
                round_lanes(1, at, plus, there)
            else:
                round_lanes(2, at, plus, there)
        else:
            values = sums[row * LANES : (row + 1) * LANES]
            for i in range(LANES):
                values[i] += shift[i]
            store(a, 8, code, (first + row) * outputs + column, count, values)


@njit(inline="always")
def _panels(a, bits, planes, centred):
    """Slots: x, codes, scale, centre, bias, y, words, facts, rows, outputs, columns, depth, group, block, code, bias's
    code. Items are panels. Without words (0) there is one block, and every thread packs it for itself."""
    rows, outputs, columns, depth, group, block, code = a[11], a[12], a[13], a[14], a[15], a[16], a[17]
    groups = (depth + group - 1) // group
    num_words, num_facts = depth // 4 * block * planes, groups * block * (planes + 2)
    own = a[9] == 0
    words = np.empty(num_words if own else 1, np.uint32)
    ints = np.empty(num_facts if own else 1, np.int32)
    at_words, at_facts = a[9], a[10]
    if own:
        at_words, at_facts = words.ctypes.data, ints.ctypes.data
        middle, digits_, start = np.int64(128 if bits == 8 else 8), np.int64(planes), np.int64(0)
        floats = ints.view(np.float32)
        _pack_block(a, start, rows, block, digits_, middle, columns, depth, group, code, at_words, ints, floats)
    sums, shift = np.empty(8 * LANES, np.float32), np.zeros(LANES, np.float32)
    panel = take(a)
    while panel < total(a):
        for p in range(panel, min(panel + grain(a), total(a))):
            codes, scale = a[4] + p * depth * 2 * bits, a[5] + p * groups * 2 * LANES
            centre = a[6] + p * groups * 2 * LANES
            count = min(LANES, outputs - p * LANES)
            if a[7]:
                _widen(a, np.int64(7), a[18], p * LANES, count, shift)
            for first in range(0, rows, block):
                x, facts = at_words + first * depth * planes, at_facts + 4 * (first // block) * num_facts
                out = sums.ctypes.data
                if block == 1:
                    panel_dot(bits, 1, planes, centred, codes, scale, centre, x, facts, groups, depth, group, out)
                elif block == 2:
                    panel_dot(bits, 2, planes, centred, codes, scale, centre, x, facts, groups, depth, group, out)
                elif block == 4:
                    panel_dot(bits, 4, planes, centred, codes, scale, centre, x, facts, groups, depth, group, out)
                else:
                    panel_dot(bits, 8, planes, centred, codes, scale, centre, x, facts, groups, depth, group, out)
                _finish(a, sums, shift, code, first, min(block, rows - first), outputs, p * LANES, count)
        panel = take(a)
    words[0], ints[0] = np.uint32(0), np.int32(0)  # numba frees an array after its last use by name


def _quantised(bits: int, planes: int, centred: int) -> Kernel:
    @kernel
    def linear_quantised(a):
        _panels(a, bits, planes, centred)

    return linear_quantised


QUANTISED = {
    (bits, planes, centred): _quantised(bits, planes, centred)
    for bits in (8, 4)
    for planes in (1, 2, 3)
    for centred in (0, 1)
}
"""Kernels by bits of a code, planes of the activations, and whether there are centres."""


@njit(inline="always")
def _rows(count, weights, block, at_weight, columns, ahead, x, chunks, out, out_row):
    """out += the products of `count` weight rows with the block over some chunks of columns; all but counts are
    addresses, and numbers of bytes."""
    stride = 2 * columns
    if count == weights:
        if block == 1:
            rows_dot(8, 1, at_weight, stride, ahead, x, chunks, out, out_row)
        elif block == 2:
            rows_dot(4, 2, at_weight, stride, ahead, x, chunks, out, out_row)
        elif block == 4:
            rows_dot(4, 4, at_weight, stride, ahead, x, chunks, out, out_row)
        else:
            rows_dot(2, 8, at_weight, stride, ahead, x, chunks, out, out_row)
    else:
        for i in range(count):
            at_row, at_out = at_weight + i * stride, out + 4 * i
            if block == 1:
                rows_dot(1, 1, at_row, stride, ahead, x, chunks, at_out, out_row)
            elif block == 2:
                rows_dot(1, 2, at_row, stride, ahead, x, chunks, at_out, out_row)
            elif block == 4:
                rows_dot(1, 4, at_row, stride, ahead, x, chunks, at_out, out_row)
            else:
                rows_dot(1, 8, at_row, stride, ahead, x, chunks, at_out, out_row)


@njit(inline="never")
def _span(a, first, count, sums, width, x_chunks):
    """sums[row, i] (rows `width` apart) += products with the weight rows [first, first + count).

    The activations of a tile of columns stay in the first cache while the weight rows pass by; what comes next is
    fetched into the second, two groups of rows ahead where columns are tiled, else AHEAD bytes.
    """
    columns, block, weights, tile = a[9], a[10], a[11], a[12]
    chunks, groups, stride = columns // 32, (count + weights - 1) // weights, 2 * columns * weights
    tiles = (chunks + tile - 1) // tile
    for t in range(tiles):
        at_x, size = x_chunks + 64 * t * tile * block, min(tile, chunks - t * tile)
        for group in range(groups):
            at = a[4] + 2 * (first * columns + 32 * t * tile) + group * stride
            ahead = np.int64(AHEAD)
            if tiles > 1:
                ahead = 2 * stride
                if group + 2 >= groups and t + 1 < tiles:
                    ahead += 64 * tile - groups * stride
            out = sums + 4 * group * weights
            _rows(min(weights, count - group * weights), weights, block, at, columns, ahead, at_x, size, out, 4 * width)


@njit(inline="never")
def _rest(a, first, count, sums, width):
    """The columns that fill no chunk."""
    rows, columns = a[7], a[9]
    x, weight = u16_array(a, 3, rows * columns), u16_array(a, 4, (first + count) * columns)
    for row in range(rows):
        for i in range(count):
            for c in range(columns // 32 * 32, columns):
                left, right = x[row * columns + c], weight[(first + i) * columns + c]
                sums[row * width + i] += bf16_to_f32(left) * bf16_to_f32(right)


@kernel
def BF16_ROWS(a):
    """Slots: x, weight, bias, y, rows, outputs, columns, block, weights, tile, bias's code. Items are groups of
    `weights` weight rows; at most `block` (1, 2, 4, 8) activation rows; columns are taken in tiles of 32 * tile."""
    rows, outputs, columns, block, weights = a[7], a[8], a[9], a[10], a[11]
    chunks, width = columns // 32, grain(a) * weights
    x_chunks = np.zeros(max(1, chunks * block * 32) if block > 1 else 1, np.uint16)
    at_x = a[3]
    if block > 1:
        at_x = x_chunks.ctypes.data
        for c in range(chunks):
            for row in range(rows):
                copy_line(a[3] + 2 * (row * columns + c * 32), at_x + 64 * (c * block + row))
    sums, shift = np.empty(block * width, np.float32), np.zeros(width, np.float32)
    item = take(a)
    while item < total(a):
        first = item * weights
        count = min(width, outputs - first)
        if a[5]:
            load(a, 5, a[13], first, count, shift)
        for row in range(block):
            sums[row * width : (row + 1) * width] = shift
        _span(a, first, count, sums.ctypes.data, width, at_x)
        if columns % 32:
            _rest(a, first, count, sums, width)
        for row in range(rows):
            store(a, 6, BF16, row * outputs + first, count, sums[row * width : (row + 1) * width])
        item = take(a)
    x_chunks[0] = np.uint16(0)  # numba frees an array after its last use by name
