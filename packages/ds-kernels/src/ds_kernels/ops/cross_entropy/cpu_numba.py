"""The loops of cross entropy over tiles [rows, width] of logits: running statistics, and the gradient.

A tile is a range of columns of the vocabulary, from `first` on; a whole row of logits is one tile. Statistics of a row
run from tile to tile: its maximum, the sum of exp(l - maximum), the target's logit, the sum of all logits.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, i64_array, load, store, take, total
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.maths import exp

__all__ = ["accumulate", "add_into", "gradient"]

BLOCK = 1024
"""Logits widened at a time, in L1."""
LANES = 64
"""Maxima kept side by side: a single one would be a chain that cannot be vectorised."""


@njit(inline="never", fastmath=FASTMATH)
def _maximum(values, lanes, n):
    """The largest of values[:n]; n is a multiple of LANES."""
    for j in range(LANES):
        lanes[j] = values[j]
    for i in range(LANES, n, LANES):
        part = values[i : i + LANES]
        for j in range(LANES):
            lanes[j] = part[j] if part[j] > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(1, LANES):
        largest = max(largest, lanes[j])
    return largest


@njit(inline="never", fastmath=FASTMATH)
def _sum_exp(values, maximum, n):
    result = np.float32(0.0)
    for i in range(n):
        result += exp(np.float32(values[i] - maximum))
    return result


@njit(inline="never", fastmath=FASTMATH)
def _sum(values, n):
    result = np.float32(0.0)
    for i in range(n):
        result += values[i]
    return result


@kernel
def accumulate(a):
    """Slots: logits, target, maximum, exps, picked, sums, rows, width, first, code, need_sums. Items are rows."""
    rows, width, first, code, need_sums = a[9], a[10], a[11], a[12], a[13]
    target = i64_array(a, 4, rows)
    maxima, exps = f32_array(a, 5, rows), f32_array(a, 6, rows)
    picked, sums = f32_array(a, 7, rows), f32_array(a, 8, rows)
    block, lanes = np.empty(BLOCK, np.float32), np.empty(LANES, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            maximum, exps_r, sums_r = maxima[r], exps[r], sums[r]
            column = target[r] - first
            for start in range(0, width, BLOCK):
                n = min(BLOCK, width - start)
                load(a, 3, code, r * width + start, n, block)
                padded = (n + LANES - 1) // LANES * LANES
                for i in range(n, padded):
                    block[i] = -np.inf
                largest = _maximum(block, lanes, padded)
                if largest > maximum:
                    exps_r = np.float32(exps_r * exp(np.float32(maximum - largest)))
                    maximum = largest
                # a block of -inf alone adds nothing; a NaN has to come through
                if maximum > -np.inf or largest != -np.inf:
                    exps_r = np.float32(exps_r + _sum_exp(block, maximum, n))
                if need_sums != 0:
                    sums_r = np.float32(sums_r + _sum(block, n))
                if start <= column < start + n:
                    picked[r] = block[column - start]
            maxima[r], exps[r], sums[r] = maximum, exps_r, sums_r
        low = take(a)


@njit(inline="never", fastmath=FASTMATH)
def _gradient_block(values, n, lse, factor, shift):
    for i in range(n):
        values[i] = np.float32(exp(np.float32(values[i] - lse)) * factor - shift)


@kernel
def gradient(a):
    """Slots: logits, out, target, lse, grad, rows, width, first, code, on_target, on_all, z_loss. Items are rows.

    out may be the logits. A row whose grad is 0 gets zeros, whatever its logits are.
    """
    rows, width, first, code = a[8], a[9], a[10], a[11]
    on_target, on_all = np.float32(float_at(a, 12)), np.float32(float_at(a, 13))
    z_loss = np.float32(float_at(a, 14))
    target, lse, grad = i64_array(a, 5, rows), f32_array(a, 6, rows), f32_array(a, 7, rows)
    block = np.empty(BLOCK, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            scale, column = grad[r], target[r] - first
            factor = np.float32(scale * (np.float32(1.0) + np.float32(2.0) * z_loss * lse[r]))
            for start in range(0, width, BLOCK):
                n = min(BLOCK, width - start)
                if scale == np.float32(0.0):
                    for i in range(n):
                        block[i] = np.float32(0.0)
                else:
                    load(a, 3, code, r * width + start, n, block)
                    _gradient_block(block, n, lse[r], factor, np.float32(scale * on_all))
                    if start <= column < start + n:
                        block[column - start] -= np.float32(scale * on_target)
                store(a, 4, code, r * width + start, n, block)
        low = take(a)


@kernel
def add_into(a):
    """Slots: sum (fp32), part, numel, code. Items are elements: sum += part."""
    numel, code = a[5], a[6]
    result = f32_array(a, 3, numel)
    block = np.empty(BLOCK, np.float32)
    low = take(a)
    while low < total(a):
        high = min(low + grain(a), total(a))
        for start in range(low, high, BLOCK):
            n = min(BLOCK, high - start)
            load(a, 4, code, start, n, block)
            own = result[start : start + n]
            for i in range(n):
                own[i] += block[i]
        low = take(a)
