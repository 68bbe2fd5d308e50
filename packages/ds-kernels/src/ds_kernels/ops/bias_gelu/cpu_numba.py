"""The loops of bias_gelu: a row is widened into a scratch row in L1, computed there and rounded once."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import f32_array, grain, load, store, take, total
from ds_kernels._cpu.launch import kernel
from ds_kernels.ops.glu.cpu_numba import GELU_ERF, gelu_erf, gelu_tanh

__all__ = ["backward", "forward"]


@kernel
def forward(a):
    """Slots: x, shift, y, dim, code, kind. Items are rows."""
    dim, code, kind = a[6], a[7], a[8]
    shift, row = f32_array(a, 4, dim), np.empty(dim, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            load(a, 3, code, r * dim, dim, row)
            if kind == GELU_ERF:
                for i in range(dim):
                    row[i] = gelu_erf(np.float32(row[i] + shift[i]))[0]
            else:
                for i in range(dim):
                    row[i] = gelu_tanh(np.float32(row[i] + shift[i]))[0]
            store(a, 5, code, r * dim, dim, row)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, x, shift, grad_x, partial, rows, dim, code, kind. Items: groups of rows, one partial sum each."""
    rows, dim, code, kind, groups = a[8], a[9], a[10], a[11], total(a)
    shift, partial = f32_array(a, 5, dim), f32_array(a, 7, groups * dim)
    row, grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group = take(a)
    while group < groups:
        own = partial[group * dim : (group + 1) * dim]
        for i in range(dim):
            own[i] = np.float32(0.0)
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            load(a, 3, code, r * dim, dim, grad)
            load(a, 4, code, r * dim, dim, row)
            if kind == GELU_ERF:
                for i in range(dim):
                    row[i] = grad[i] * gelu_erf(np.float32(row[i] + shift[i]))[1]
            else:
                for i in range(dim):
                    row[i] = grad[i] * gelu_tanh(np.float32(row[i] + shift[i]))[1]
            for i in range(dim):
                own[i] += row[i]
            store(a, 6, code, r * dim, dim, row)
        group = take(a)
