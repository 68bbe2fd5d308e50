"""The loops of layer_norm: a row is widened into a scratch row in L1, then reduced, scaled and rounded from there.

Rows of fp32 are reduced and scaled where they lie, and the next row is fetched while one is worked on: what counts
there is memory.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, load, load_sum, store, take, total
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.rows import prefetch

__all__ = ["backward", "forward"]


@njit(inline="never", fastmath=FASTMATH)
def _sum(row):
    plain = np.float32(0.0)
    for i in range(len(row)):
        plain += row[i]
    return plain


@njit(inline="never", fastmath=FASTMATH)
def _sum_added(row, other, out):
    """out = row + other; returns its sum."""
    plain = np.float32(0.0)
    for i in range(len(row)):
        value = row[i] + other[i]
        out[i] = value
        plain += value
    return plain


@njit(inline="never", fastmath=FASTMATH)
def _squares(row, centre):
    """The sum of (row - centre) ** 2."""
    square = np.float32(0.0)
    for i in range(len(row)):
        value = np.float32(row[i] - centre)
        square += value * value
    return square


@njit(inline="never", fastmath=FASTMATH)
def _scaled(row, centre, inverse, scale, shift, out):
    for i in range(len(row)):
        out[i] = np.float32((row[i] - centre) * inverse) * scale[i] + shift[i]


@njit(inline="never")
def _fetch(address, nbytes):
    """Ask for what lies at an address, unless that is 0."""
    if address:
        for line in range(address, address + nbytes, 64):
            prefetch(line)


@njit(inline="never", fastmath=FASTMATH)
def _gradients(grad, row, centre, inverse, scale, of_weight, of_bias):
    """Add to the gradients of weight and bias; returns the sums of grad * scale and of that times the normal row."""
    plain, dot = np.float32(0.0), np.float32(0.0)
    for i in range(len(row)):
        normal = np.float32((row[i] - centre) * inverse)
        of_weight[i] += grad[i] * normal
        of_bias[i] += grad[i]
        scaled = np.float32(grad[i] * scale[i])
        plain += scaled
        dot += scaled * normal
    return plain, dot


@njit(inline="never", fastmath=FASTMATH)
def _grad_row(grad, row, centre, inverse, scale, average, pull, out):
    for i in range(len(row)):
        normal = np.float32((row[i] - centre) * inverse)
        out[i] = inverse * (grad[i] * scale[i] - average - normal * pull)


@njit(inline="never", fastmath=FASTMATH)
def _add(row, out):
    for i in range(len(row)):
        out[i] += row[i]


@kernel
def forward(a):
    """Slots: x, residual or 0, scale, shift, y, total, mean, rstd, rows, dim, code, eps. Items are rows."""
    rows, dim, code, eps = a[11], a[12], a[13], float_at(a, 14)
    scale, shift = f32_array(a, 5, dim), f32_array(a, 6, dim)
    mean, rstd = f32_array(a, 9, rows), f32_array(a, 10, rows)
    row, other = np.empty(dim, np.float32), np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            if code == 0:
                first, last = r * dim, (r + 1) * dim
                source = f32_array(a, 3, last)[first:]
                if a[4]:
                    row_total = f32_array(a, 8, last)[first:]
                    plain = _sum_added(source, f32_array(a, 4, last)[first:], row_total)
                    source = row_total
                else:
                    plain = _sum(source)
                if r + 1 < rows:
                    _fetch(a[3] + 4 * last, 4 * dim)
                    _fetch(a[4] + 4 * last if a[4] else 0, 4 * dim)
                centre = np.float32(plain / dim)
                inverse = np.float32(1.0 / np.sqrt(_squares(source, centre) / dim + eps))
                mean[r], rstd[r] = centre, inverse
                _scaled(source, centre, inverse, scale, shift, f32_array(a, 7, last)[first:])
                continue
            load_sum(a, 3, 4, 8, code, r * dim, dim, row, other)  # what is normalised is what was rounded
            plain = np.float32(0.0)
            for i in range(dim):
                plain += row[i]
            centre = np.float32(plain / dim)
            square = np.float32(0.0)
            for i in range(dim):
                row[i] -= centre
                square += row[i] * row[i]
            root = np.sqrt(square / dim + eps)
            inverse = np.float32(1.0 / root)
            mean[r], rstd[r] = centre, inverse
            for i in range(dim):
                row[i] = row[i] * inverse * scale[i] + shift[i]
            store(a, 7, code, r * dim, dim, row)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, grad_total or 0, x, scale, mean, rstd, grad_x, partial, rows, dim, code. Items: groups of rows."""
    rows, dim, code, groups = a[11], a[12], a[13], total(a)
    scale, mean, rstd = f32_array(a, 6, dim), f32_array(a, 7, rows), f32_array(a, 8, rows)
    partial = f32_array(a, 10, 2 * groups * dim)
    row, grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group = take(a)
    while group < groups:
        of_weight = partial[group * dim : (group + 1) * dim]
        of_bias = partial[(groups + group) * dim : (groups + group + 1) * dim]
        for i in range(dim):
            of_weight[i] = np.float32(0.0)
            of_bias[i] = np.float32(0.0)
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            centre, inverse = mean[r], rstd[r]
            if code == 0:
                first, last = r * dim, (r + 1) * dim
                upper, source = f32_array(a, 3, last)[first:], f32_array(a, 5, last)[first:]
                plain, dot = _gradients(upper, source, centre, inverse, scale, of_weight, of_bias)
                if r + 1 < rows:
                    _fetch(a[3] + 4 * last, 4 * dim)
                    _fetch(a[5] + 4 * last, 4 * dim)
                    _fetch(a[4] + 4 * last if a[4] else 0, 4 * dim)
                average, pull = np.float32(plain / dim), np.float32(dot / dim)
                out = f32_array(a, 9, last)[first:]
                _grad_row(upper, source, centre, inverse, scale, average, pull, out)
                if a[4]:
                    _add(f32_array(a, 4, last)[first:], out)
                continue
            load(a, 3, code, r * dim, dim, grad)
            load(a, 5, code, r * dim, dim, row)
            plain, dot = np.float32(0.0), np.float32(0.0)
            for i in range(dim):
                normal = np.float32((row[i] - centre) * inverse)
                of_weight[i] += grad[i] * normal
                of_bias[i] += grad[i]
                scaled = np.float32(grad[i] * scale[i])
                plain += scaled
                dot += scaled * normal
                row[i] = normal
                grad[i] = scaled
            average, pull = np.float32(plain / dim), np.float32(dot / dim)
            for i in range(dim):
                row[i] = inverse * (grad[i] - average - row[i] * pull)
            if a[4] != 0:
                load(a, 4, code, r * dim, dim, grad)
                for i in range(dim):
                    row[i] += grad[i]
            store(a, 9, code, r * dim, dim, row)
        group = take(a)
