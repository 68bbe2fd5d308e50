"""The loops of moe_dispatch and moe_combine: rows are copied, scaled, summed or multiplied whole."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import f32_array, grain, i64_array, load, store, take, total, u16_array
from ds_kernels._cpu.launch import kernel

__all__ = ["copy_rows", "dot_rows", "scale_rows", "sum_rows"]


@kernel
def copy_rows(a):
    """Slots: x, sources, out, words (of 16 bits in a row), top_k. Items are rows of out."""
    words, top_k = a[6], a[7]
    sources = i64_array(a, 4, total(a))
    out = u16_array(a, 5, total(a) * words)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            source, to = sources[r], out[r * words : (r + 1) * words]
            if source < 0:
                for i in range(words):
                    to[i] = np.uint16(0)
            else:
                start = source // top_k * words
                row = u16_array(a, 3, start + words)[start:]
                for i in range(words):
                    to[i] = row[i]
        low = take(a)


@kernel
def scale_rows(a):
    """Slots: x, sources, weights (fp32), out, hidden, top_k, choices, code. Items are rows of out."""
    hidden, top_k, choices, code = a[7], a[8], a[9], a[10]
    sources, weights = i64_array(a, 4, total(a)), f32_array(a, 5, choices)
    row = np.empty(hidden, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            source = sources[r]
            if source < 0:
                for i in range(hidden):
                    row[i] = np.float32(0.0)
            else:
                load(a, 3, code, source // top_k * hidden, hidden, row)
                factor = weights[source]
                for i in range(hidden):
                    row[i] = row[i] * factor
            store(a, 6, code, r * hidden, hidden, row)
        low = take(a)


@kernel
def sum_rows(a):
    """Slots: y, slots, weights (fp32), out, hidden, top_k, code. Items are tokens."""
    hidden, top_k, code = a[7], a[8], a[9]
    slots, weights = i64_array(a, 4, total(a) * top_k), f32_array(a, 5, total(a) * top_k)
    row, sums = np.empty(hidden, np.float32), np.empty(hidden, np.float32)
    low = take(a)
    while low < total(a):
        for t in range(low, min(low + grain(a), total(a))):
            for i in range(hidden):
                sums[i] = np.float32(0.0)
            for choice in range(t * top_k, (t + 1) * top_k):
                if slots[choice] >= 0:
                    load(a, 3, code, slots[choice] * hidden, hidden, row)
                    factor = weights[choice]
                    for i in range(hidden):
                        sums[i] += factor * row[i]
            store(a, 6, code, t * hidden, hidden, sums)
        low = take(a)


@kernel
def dot_rows(a):
    """Slots: grad, y, slots, out (fp32), hidden, top_k, code. Items are tokens."""
    hidden, top_k, code = a[7], a[8], a[9]
    slots, out = i64_array(a, 5, total(a) * top_k), f32_array(a, 6, total(a) * top_k)
    row, grad = np.empty(hidden, np.float32), np.empty(hidden, np.float32)
    low = take(a)
    while low < total(a):
        for t in range(low, min(low + grain(a), total(a))):
            load(a, 3, code, t * hidden, hidden, grad)
            for choice in range(t * top_k, (t + 1) * top_k):
                dot = np.float32(0.0)
                if slots[choice] >= 0:
                    load(a, 4, code, slots[choice] * hidden, hidden, row)
                    for i in range(hidden):
                        dot += grad[i] * row[i]
                out[choice] = dot
        low = take(a)
