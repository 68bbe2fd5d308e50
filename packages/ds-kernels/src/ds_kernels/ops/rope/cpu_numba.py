"""The loops of rope: rows that lie next to each other are widened, rotated and rounded as one run.

Of [batch, heads, seq, dim] memory usually has either the heads of a position or the positions of a head side by side.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_array, grain, load, store, take, total
from ds_kernels._cpu.launch import FASTMATH, kernel

__all__ = ["POSITIONS", "rotate"]

POSITIONS = 16
"""Positions per item."""


@njit(fastmath=FASTMATH)
def _halves(first, second, cos, sin):
    for i in range(cos.size):
        a, b = first[i], second[i]
        first[i] = a * cos[i] - b * sin[i]
        second[i] = b * cos[i] + a * sin[i]


@njit(fastmath=FASTMATH)
def _neighbours(row, cos, sin):
    for i in range(cos.size):
        a, b = row[2 * i], row[2 * i + 1]
        row[2 * i] = a * cos[i] - b * sin[i]
        row[2 * i + 1] = b * cos[i] + a * sin[i]


@kernel
def rotate(a):
    """Slots: x, out, cos, sin, heads, seq, dim, half, angles per batch, code, interleaved, strides of x and of out.

    Strides are those of batch, heads and seq, in elements. Items are blocks of POSITIONS positions of one batch row.
    """
    heads, seq, dim, half, code, interleaved = a[7], a[8], a[9], a[10], a[12], a[13]
    blocks = (seq + POSITIONS - 1) // POSITIONS
    batches = total(a) // blocks
    rows = seq if a[11] == 0 else batches * seq
    cos, sin = f32_array(a, 5, rows * half), f32_array(a, 6, rows * half)
    by_head = a[15] == dim and a[18] == dim
    by_position = not by_head and a[16] == dim and a[19] == dim
    buffer = np.empty(dim * (heads if by_head else POSITIONS), np.float32)
    low = take(a)
    while low < total(a):
        for item in range(low, min(low + grain(a), total(a))):
            batch, begin = item // blocks, item % blocks * POSITIONS
            count = min(POSITIONS, seq - begin)
            run = heads if by_head else (count if by_position else 1)
            for outer in range(heads * count // run):
                if by_head:
                    head, position = 0, begin + outer
                elif by_position:
                    head, position = outer, begin
                else:
                    head, position = outer // count, begin + outer % count
                load(a, 3, code, batch * a[14] + head * a[15] + position * a[16], run * dim, buffer)
                for r in range(run):
                    angle = (batch * a[11] + position + (0 if by_head else r)) * half
                    c, s, start = cos[angle : angle + half], sin[angle : angle + half], r * dim
                    if interleaved != 0:
                        _neighbours(buffer[start : start + 2 * half], c, s)
                    else:
                        _halves(buffer[start : start + half], buffer[start + half : start + 2 * half], c, s)
                store(a, 4, code, batch * a[17] + head * a[18] + position * a[19], run * dim, buffer)
        low = take(a)
