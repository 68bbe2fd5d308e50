"""The loops of rms_norm: a row is widened into a scratch row in L1, then reduced, scaled and rounded from there."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, load, load_sum, store, take, total
from ds_kernels._cpu.launch import kernel

__all__ = ["backward", "forward"]


@kernel
def forward(a):
    """Slots: x, residual or 0, scale, y, total, rstd, rows, dim, code, eps. Items are rows."""
    rows, dim, code, eps = a[9], a[10], a[11], float_at(a, 12)
    scale, rstd = f32_array(a, 5, dim), f32_array(a, 8, rows)
    row, other = np.empty(dim, np.float32), np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            load_sum(a, 3, 4, 7, code, r * dim, dim, row, other)  # what is normalised is what was rounded
            square = np.float32(0.0)
            for i in range(dim):
                square += row[i] * row[i]
            root = np.sqrt(square / dim + eps)
            inverse = np.float32(1.0 / root)
            rstd[r] = inverse
            for i in range(dim):
                row[i] = row[i] * inverse * scale[i]
            store(a, 6, code, r * dim, dim, row)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, grad_total or 0, x, scale, rstd, grad_x, partial, rows, dim, code. Items are groups of rows."""
    rows, dim, code, groups = a[10], a[11], a[12], total(a)
    scale, rstd, partial = f32_array(a, 6, dim), f32_array(a, 7, rows), f32_array(a, 9, groups * dim)
    row, grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group = take(a)
    while group < groups:
        own = partial[group * dim : (group + 1) * dim]
        for i in range(dim):
            own[i] = np.float32(0.0)
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            load(a, 3, code, r * dim, dim, grad)
            load(a, 5, code, r * dim, dim, row)
            inverse, dot = rstd[r], np.float32(0.0)
            for i in range(dim):
                own[i] += grad[i] * row[i] * inverse
                dot += grad[i] * scale[i] * row[i]
            pull = np.float32(dot / dim) * inverse * inverse
            for i in range(dim):
                row[i] = inverse * (grad[i] * scale[i] - row[i] * pull)
            if a[4] != 0:
                load(a, 4, code, r * dim, dim, grad)
                for i in range(dim):
                    row[i] += grad[i]
            store(a, 8, code, r * dim, dim, row)
        group = take(a)
