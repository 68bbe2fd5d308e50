"""The loops of softmax: a row is widened into a scratch row in L1, then masked, reduced and rounded from there."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ds_kernels._cpu.intrinsics import f32_array, float_at, grain, load, store, take, total, u8_array
from ds_kernels._cpu.launch import FASTMATH, kernel
from ds_kernels._cpu.maths import exp, ratio

__all__ = ["backward", "forward"]

_INFINITY = np.float32(np.inf)


@intrinsic
def _order(_context: Any, value: Any) -> Any:
    """A float's bits as an integer that compares as the float does, so that a maximum vectorises in spite of NaN."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        sign = builder.ashr(bits, ir.Constant(word, 31))
        return builder.xor(bits, builder.lshr(sign, ir.Constant(word, 1)))

    return types.int32(types.float32), codegen


@intrinsic
def _from_order(_context: Any, bits: Any) -> Any:
    """The float of `_order`."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        sign = builder.ashr(args[0], ir.Constant(word, 31))
        return builder.bitcast(builder.xor(args[0], builder.lshr(sign, ir.Constant(word, 1))), ir.FloatType())

    return types.float32(types.int32), codegen


@njit(forceinline=True, fastmath=FASTMATH)
def _maximum(row):
    highest = _order(-_INFINITY)
    for i in range(row.size):
        value = _order(row[i])
        highest = value if value > highest else highest
    return _from_order(highest)


@njit(forceinline=True, fastmath=FASTMATH)
def _normalise(row):
    """Softmax in place; a row of nothing but -inf becomes zeros."""
    highest = _maximum(row)
    if highest == -_INFINITY:
        unseen = np.float32(0.0)  # or NaN: with its sign set (inf - inf on x86) a NaN is below -inf to `_maximum`
        for i in range(row.size):
            unseen += np.float32(0.0) if row[i] == -_INFINITY else row[i]
        for i in range(row.size):
            row[i] = unseen
        return
    whole = np.float32(0.0)
    for i in range(row.size):
        value = exp(np.float32(row[i] - highest))
        row[i] = value
        whole += value
    inverse = ratio(np.float32(1.0), whole)
    for i in range(row.size):
        row[i] *= inverse


@njit(inline="always")
def _limit(causal, row, rows, cols):
    """How many columns a row sees."""
    return cols if causal == 0 else max(0, min(cols, row % rows + 1 + cols - rows))


@kernel
def forward(a):
    """Slots: x, mask, y, rows, inner, cols, code, kind of mask, strides of mask (outer, inner, rows), causal, scale.

    Items are rows of [outer, inner, rows, cols].
    """
    rows, inner, cols, code, kind, scale = a[6], a[7], a[8], a[9], a[10], np.float32(float_at(a, 15))
    buffer = np.empty(cols, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            seen = _limit(a[14], r, rows, cols)
            row = buffer[:seen]
            load(a, 3, code, r * cols, seen, row)
            start = r // (rows * inner) * a[11] + r // rows % inner * a[12] + r % rows * a[13]
            if kind == 2:
                added = f32_array(a, 4, start + cols)[start:]
                for i in range(seen):
                    row[i] = row[i] * scale + added[i]
            elif kind == 1:
                kept = u8_array(a, 4, start + cols)[start:]
                for i in range(seen):
                    value = np.float32(row[i] * scale)
                    row[i] = value if kept[i] != 0 else -_INFINITY
            else:
                for i in range(seen):
                    row[i] *= scale
            _normalise(row)
            for i in range(seen, cols):
                buffer[i] = np.float32(0.0)
            store(a, 5, code, r * cols, cols, buffer)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, y, grad_x, rows, cols, code, causal, scale. Items are rows."""
    rows, cols, code, scale = a[6], a[7], a[8], np.float32(float_at(a, 10))
    buffer, grad = np.empty(cols, np.float32), np.empty(cols, np.float32)
    low = take(a)
    while low < total(a):
        for r in range(low, min(low + grain(a), total(a))):
            seen = _limit(a[9], r, rows, cols)
            load(a, 3, code, r * cols, seen, grad)
            load(a, 4, code, r * cols, seen, buffer)
            inner = np.float32(0.0)
            for i in range(seen):
                inner += grad[i] * buffer[i]
            for i in range(seen):
                buffer[i] = scale * buffer[i] * (grad[i] - inner)
            for i in range(seen, cols):
                buffer[i] = np.float32(0.0)
            store(a, 5, code, r * cols, cols, buffer)
        low = take(a)
