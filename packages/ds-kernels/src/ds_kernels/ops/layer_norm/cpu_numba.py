"""The loops of layer_norm: a row is widened into a scratch row in L1, then reduced, scaled and rounded from there."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, load, load_sum, store, take, total
from ds_kernels._cpu.launch import kernel

__all__ = ["backward", "forward"]


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
            load(a, 3, code, r * dim, dim, grad)
            load(a, 5, code, r * dim, dim, row)
            centre, inverse = mean[r], rstd[r]
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
