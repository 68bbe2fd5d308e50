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
    as_bits,
    as_float,
    bf16_to_f32,
    f32_array,
    f32_to_bf16,
    grain,
    i32_array,
    load,
    store,
    take,
    total,
    u16_array,
    u32_array,
)  # fmt: skip
from ds_kernels._cpu.launch import FASTMATH, Kernel, kernel
from ds_kernels.ops.linear.vector import LANES, panel_dot, rint, rows_dot

__all__ = ["BF16_ROWS", "QUANTISED", "pack_blocks"]


@njit(cache=True, fastmath=FASTMATH)
def _pack_row(values, depth, group, block, row, planes, middle, words, ints, floats, digits, octets):
    """Quantise one row of a block; see the module's text for the layout."""
    facts = block * (planes + 2)
    limit = np.float64(127.0 if planes == 1 else 32639.0 if planes == 2 else 32639.0 * 256)
    for g in range((depth + group - 1) // group):
        first, count = g * group, min(group, depth - g * group)
        part = values[first : first + count]
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, as_bits(part[i]) & np.uint32(0x7FFFFFFF))
        inverse, unit = np.float32(0.0), np.float32(0.0)
        if largest >= np.uint32(0x7F800000):
            unit = as_float(np.uint32(0x7FC00000))
        elif largest > np.uint32(0):
            inverse = np.float32(min(limit / np.float64(as_float(largest)), 3e38))
            unit = np.float32(np.float64(1.0) / np.float64(inverse))
        whole = np.int64(0)
        for i in range(count):
            digits[i] = np.int32(rint(np.float32(part[i] * inverse)))
        for plane in range(planes):
            amount = np.int32(0)
            for i in range(count):
                low = np.int8(digits[i])
                octets[i] = low
                amount += np.int32(low)
                digits[i] = (digits[i] - np.int32(low)) >> np.int32(8)
            target, quads = words[(first // 4 * block + row) * planes + plane :], octets.view(np.uint32)
            for q in range(count // 4):
                target[q * block * planes] = quads[q]
            ints[g * facts + row * planes + plane] = np.int32(-middle * amount)
            whole += np.int64(amount) << np.int64(8 * plane)
        floats[g * facts + block * planes + row] = unit
        floats[g * facts + block * (planes + 1) + row] = np.float32(unit * np.float64(whole))


@njit(cache=True, fastmath=FASTMATH)
def _pack_block(a, first, rows, block, planes, middle, columns, depth, group, code, words, ints, floats):
    """Pack activation rows [first, first + block); rows past the end are zeros."""
    values, digits, octets = np.empty(depth, np.float32), np.empty(group, np.int32), np.empty(group, np.int8)
    for i in range(columns, depth):
        values[i] = np.float32(0.0)
    for row in range(block):
        if first + row < rows:
            load(a, 3, code, (first + row) * columns, columns, values)
        else:
            for i in range(columns):
                values[i] = np.float32(0.0)
        _pack_row(values, depth, group, block, row, planes, middle, words, ints, floats, digits, octets)


@kernel
def pack_blocks(a):
    """Slots: x, words, facts, rows, columns, depth, group, block, planes, middle, code. Items are blocks of rows."""
    rows, columns, depth, group, block, planes, middle, code = a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    num_words = depth // 4 * block * planes
    num_facts = (depth + group - 1) // group * block * (planes + 2)
    words = u32_array(a, 4, total(a) * num_words)
    ints, floats = i32_array(a, 5, total(a) * num_facts), f32_array(a, 5, total(a) * num_facts)
    i = take(a)
    while i < total(a):
        _pack_block(
            a, i * block, rows, block, planes, middle, columns, depth, group, code,
            words[i * num_words :], ints[i * num_facts :], floats[i * num_facts :],
        )  # fmt: skip
        i = take(a)


@njit(cache=True)
def _widen(a, slot, code, start, count, out):
    """`load`, but compiled once, not into every kernel."""
    load(a, slot, code, start, count, out)


@njit(cache=True)
def _finish(a, sums, shift, code, first, rows, outputs, column, count):
    """Add the bias to a block's sums over one panel and round them into y (slot 8)."""
    for row in range(rows):
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
        middle, digits, start = np.int64(128 if bits == 8 else 8), np.int64(planes), np.int64(0)
        floats = ints.view(np.float32)
        _pack_block(a, start, rows, block, digits, middle, columns, depth, group, code, words, ints, floats)
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
def _rows(a, at_weight, count, rows, block, columns, x, x_chunks, sums, weights):
    """Products of `count` weight rows with the block: the vector code's, plus the columns that fill no chunk."""
    chunks, stride = columns // 32, 2 * columns
    out = sums.ctypes.data
    if count == weights:
        if block == 1:
            rows_dot(8, 1, at_weight, stride, x_chunks.ctypes.data, chunks, out)
        elif block == 2:
            rows_dot(4, 2, at_weight, stride, x_chunks.ctypes.data, chunks, out)
        elif block == 4:
            rows_dot(4, 4, at_weight, stride, x_chunks.ctypes.data, chunks, out)
        else:
            rows_dot(2, 8, at_weight, stride, x_chunks.ctypes.data, chunks, out)
    else:
        for i in range(count):
            at_row, at_out = at_weight + i * stride, out + 4 * i * block
            if block == 1:
                rows_dot(1, 1, at_row, stride, x_chunks.ctypes.data, chunks, at_out)
            elif block == 2:
                rows_dot(1, 2, at_row, stride, x_chunks.ctypes.data, chunks, at_out)
            elif block == 4:
                rows_dot(1, 4, at_row, stride, x_chunks.ctypes.data, chunks, at_out)
            else:
                rows_dot(1, 8, at_row, stride, x_chunks.ctypes.data, chunks, at_out)


@kernel
def BF16_ROWS(a):
    """Slots: x, weight, bias, y, rows, outputs, columns, block, weights, bias's code. Items are groups of `weights`
    weight rows; at most `block` (1, 2, 4, 8) activation rows."""
    rows, outputs, columns, block, weights = a[7], a[8], a[9], a[10], a[11]
    chunks = columns // 32
    x = u16_array(a, 3, rows * columns)
    weight = u16_array(a, 4, outputs * columns)
    y = u16_array(a, 6, rows * outputs)
    x_chunks = np.zeros(max(1, chunks * block * 32), np.uint16)
    for c in range(chunks):
        for row in range(rows):
            for i in range(32):
                x_chunks[(c * block + row) * 32 + i] = x[row * columns + c * 32 + i]
    sums, shift = np.empty(32, np.float32), np.zeros(8, np.float32)
    item = take(a)
    while item < total(a):
        for group in range(item, min(item + grain(a), total(a))):
            first = group * weights
            count = min(weights, outputs - first)
            _rows(a, a[4] + 2 * first * columns, count, rows, block, columns, x, x_chunks, sums, weights)
            if a[5]:
                load(a, 5, a[12], first, count, shift)
            for i in range(count):
                for row in range(rows):
                    value = sums[i * block + row] + shift[i]
                    for c in range(chunks * 32, columns):
                        left, right = x[row * columns + c], weight[(first + i) * columns + c]
                        value += bf16_to_f32(left) * bf16_to_f32(right)
                    y[row * outputs + first + i] = f32_to_bf16(np.float32(value))
        item = take(a)
    x_chunks[0] = np.uint16(0)  # numba frees an array after its last use by name
