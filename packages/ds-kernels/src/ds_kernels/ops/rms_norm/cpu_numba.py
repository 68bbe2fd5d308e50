"""The loops of rms_norm: a row is widened into a scratch row in L1, then reduced, scaled and rounded from there."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, load, store, take, total
from ds_kernels._cpu.launch import kernel

__all__ = ["backward", "forward"]


@kernel
def forward(a):
    """Slots: x, scale, y, rstd, rows, dim, code, eps. Items are rows."""
    rows, dim, code, eps = a[7], a[8], a[9], float_at(a, 10)
    scale, rstd = f32_array(a, 4, dim), f32_array(a, 6, rows)
    row = np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            load(a, 3, code, r * dim, dim, row)
            square = np.float32(0.0)
            for i in range(dim):
                square += row[i] * row[i]
            inverse = np.float32(1.0 / np.sqrt(square / dim + eps))
            rstd[r] = inverse
            for i in range(dim):
                row[i] = row[i] * inverse * scale[i]
            store(a, 5, code, r * dim, dim, row)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, x, scale, rstd, grad_x, partial, rows, dim, code. Items are groups of rows, one partial sum each."""
    rows, dim, code, groups = a[9], a[10], a[11], total(a)
    scale, rstd, partial = f32_array(a, 5, dim), f32_array(a, 6, rows), f32_array(a, 8, groups * dim)
    row, grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group = take(a)
    while group < groups:
        own = partial[group * dim : (group + 1) * dim]
        for i in range(dim):
            own[i] = np.float32(0.0)
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            load(a, 3, code, r * dim, dim, grad)
            load(a, 4, code, r * dim, dim, row)
            inverse, dot = rstd[r], np.float32(0.0)
            for i in range(dim):
                own[i] += grad[i] * row[i] * inverse
                dot += grad[i] * scale[i] * row[i]
            pull = np.float32(dot / dim) * inverse * inverse
            for i in range(dim):
                row[i] = inverse * (grad[i] * scale[i] - row[i] * pull)
            store(a, 7, code, r * dim, dim, row)
        group = take(a)
