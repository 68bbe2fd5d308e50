"""The loops of bias_dropout_residual: a row is widened into L1, its random words are hashed there, rounded once."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, i64_array, load, store, take, total
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.maths import mix

__all__ = ["backward", "forward"]


@njit(fastmath=FASTMATH)
def _drop(row, seed, r, threshold, scale):
    """Zero what is not kept of row number r, scale the rest; see the reference for the words."""
    key0 = mix(np.uint32(np.uint32(seed) ^ np.uint32(0x9E3779B9)))
    key1 = mix(np.uint32(np.uint32(seed >> 32) ^ key0))
    row0 = mix(np.uint32(np.uint32(r) ^ key0))
    row1 = mix(np.uint32(row0 + key1))
    for i in range(row.size):
        word = mix(np.uint32(mix(np.uint32(np.uint32(i) ^ row0)) ^ row1))
        value = np.float32(row[i] * scale)
        row[i] = value if word >= threshold else np.float32(0.0)


@kernel
def forward(a):
    """Slots: x, shift, residual or 0, seed, out, dim, code, threshold, scale. Items are rows."""
    dim, code, threshold, scale = a[8], a[9], np.uint32(a[10]), np.float32(float_at(a, 11))
    shift, seed = f32_array(a, 4, dim), i64_array(a, 6, 1)[0]
    row, other = np.empty(dim, np.float32), np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            load(a, 3, code, r * dim, dim, row)
            for i in range(dim):
                row[i] += shift[i]
            if threshold != 0:
                _drop(row, seed, r, threshold, scale)
            if a[5] != 0:
                load(a, 5, code, r * dim, dim, other)
                for i in range(dim):
                    row[i] += other[i]
            store(a, 7, code, r * dim, dim, row)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, seed, grad_x, partial, rows, dim, code, threshold, scale. Items: groups of rows, a sum each."""
    rows, dim, code, threshold, scale = a[7], a[8], a[9], np.uint32(a[10]), np.float32(float_at(a, 11))
    groups = total(a)
    seed, partial = i64_array(a, 4, 1)[0], f32_array(a, 6, groups * dim)
    row = np.empty(dim, np.float32)
    group = take(a)
    while group < groups:
        own = partial[group * dim : (group + 1) * dim]
        for i in range(dim):
            own[i] = np.float32(0.0)
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            load(a, 3, code, r * dim, dim, row)
            if threshold != 0:
                _drop(row, seed, r, threshold, scale)
            for i in range(dim):
                own[i] += row[i]
            store(a, 5, code, r * dim, dim, row)
        group = take(a)
