"""The loop of grouped_gemm for groups of few rows: a row of weights is read once and met with all rows of its group."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    bf16_to_f32,
    f32_array,
    f32_to_bf16,
    f32_to_fp16,
    fp16_to_f32,
    grain,
    i64_array,
    take,
    total,
    u16_array,
)
from ds_kernels._cpu.launch import FASTMATH, kernel

__all__ = ["few_rows"]


@njit(inline="never", fastmath=FASTMATH)
def _dot_bf16(w, x):
    total = np.float32(0.0)
    for i in range(w.size):
        total += bf16_to_f32(w[i]) * x[i]
    return total


@njit(inline="never", fastmath=FASTMATH)
def _dot_fp16(w, x):
    total = np.float32(0.0)
    for i in range(w.size):
        total += fp16_to_f32(w[i]) * x[i]
    return total


@njit(inline="never", fastmath=FASTMATH)
def _dot_f32(w, x):
    total = np.float32(0.0)
    for i in range(w.size):
        total += w[i] * x[i]
    return total


@kernel
def few_rows(a):
    """Slots: x (fp32), weight, ends (int64), bias (fp32), y, groups, out, inner, code, few, block.

    Items are blocks of outputs of one group. A row of weights is in L1 when the second row of x meets it.
    """
    groups, out, inner, code, few, block = a[8], a[9], a[10], a[11], a[12], a[13]
    ends, bias = i64_array(a, 5, groups), f32_array(a, 6, groups * out)
    blocks = (out + block - 1) // block
    rows = ends[groups - 1]
    x = f32_array(a, 3, rows * inner)
    low = take(a)
    while low < total(a):
        for item in range(low, min(low + grain(a), total(a))):
            group = item // blocks
            start = (item - group * blocks) * block
            first = ends[group - 1] if group > 0 else np.int64(0)
            last = ends[group]
            if last - first > few:
                continue
            for o in range(start, min(start + block, out)):
                at = (group * out + o) * inner
                shift = bias[group * out + o]
                for r in range(first, last):
                    row = x[r * inner : (r + 1) * inner]
                    if code == 1:
                        value = _dot_bf16(u16_array(a, 4, at + inner)[at:], row) + shift
                        u16_array(a, 7, rows * out)[r * out + o] = f32_to_bf16(value)
                    elif code == 2:
                        value = _dot_fp16(u16_array(a, 4, at + inner)[at:], row) + shift
                        u16_array(a, 7, rows * out)[r * out + o] = f32_to_fp16(value)
                    else:
                        f32_array(a, 7, rows * out)[r * out + o] = (
                            _dot_f32(f32_array(a, 4, at + inner)[at:], row) + shift
                        )
        low = take(a)
