"""The loops of swiglu and geglu: a block of each operand is widened into L1, computed there and rounded once."""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import grain, load, store, take, total
from ds_kernels._cpu.launch import kernel
from ds_kernels._cpu.maths import normal_cdf, normal_pdf, sigmoid

__all__ = ["BLOCK", "GELU_ERF", "SILU", "backward", "forward", "gelu_erf", "gelu_tanh", "silu"]

BLOCK = 1024
"""Elements per item."""
SILU, GELU_ERF = 0, 2

_ONE = np.float32(1.0)
_SCALE = np.float32(1.5957691216057308)
_CUBIC = np.float32(0.044715)
_SLOPE = np.float32(3 * 0.044715)
_FAR = np.float32(32.0)


@njit(inline="always")
def silu(x):
    """`(silu(x), its derivative)`; what is not used costs nothing."""
    share = sigmoid(x)
    value = np.float32(x * share)
    return value, np.float32(share + value * (_ONE - share))


@njit(inline="always")
def gelu_tanh(x):
    """`(gelu(x), its derivative)` of the tanh form; see the reference for |x| > 32."""
    low = -_FAR if x < -_FAR else x
    near = _FAR if low > _FAR else low
    square = np.float32(near * near)
    share = sigmoid(np.float32(_SCALE * near * (_ONE + _CUBIC * square)))
    slope = np.float32(share * (_ONE - share) * near * _SCALE * (_ONE + _SLOPE * square))
    return np.float32(x * share), np.float32(share + slope)


@njit(inline="always")
def gelu_erf(x):
    """`(gelu(x), its derivative)`."""
    cdf = normal_cdf(x)
    return np.float32(x * cdf), np.float32(cdf + x * normal_pdf(x))


@kernel
def forward(a):
    """Slots: gate, up, out, numel, code, kind. Items are blocks."""
    numel, code, kind = a[6], a[7], a[8]
    gate, up = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    low = take(a)
    while low < total(a):
        for block in range(low, min(low + grain(a), total(a))):
            start = block * BLOCK
            n = min(BLOCK, numel - start)
            load(a, 3, code, start, n, gate)
            load(a, 4, code, start, n, up)
            if kind == SILU:
                for i in range(n):
                    up[i] *= silu(gate[i])[0]
            elif kind == GELU_ERF:
                for i in range(n):
                    up[i] *= gelu_erf(gate[i])[0]
            else:
                for i in range(n):
                    up[i] *= gelu_tanh(gate[i])[0]
            store(a, 5, code, start, n, up)
        low = take(a)


@kernel
def backward(a):
    """Slots: grad, gate, up, grad_gate, grad_up, numel, code, kind. Items are blocks."""
    numel, code, kind = a[8], a[9], a[10]
    grad, gate, up = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    low = take(a)
    while low < total(a):
        for block in range(low, min(low + grain(a), total(a))):
            start = block * BLOCK
            n = min(BLOCK, numel - start)
            load(a, 3, code, start, n, grad)
            load(a, 4, code, start, n, gate)
            load(a, 5, code, start, n, up)
            if kind == SILU:
                for i in range(n):
                    value, slope = silu(gate[i])
                    gate[i] = grad[i] * up[i] * slope
                    up[i] = grad[i] * value
            elif kind == GELU_ERF:
                for i in range(n):
                    value, slope = gelu_erf(gate[i])
                    gate[i] = grad[i] * up[i] * slope
                    up[i] = grad[i] * value
            else:
                for i in range(n):
                    value, slope = gelu_tanh(gate[i])
                    gate[i] = grad[i] * up[i] * slope
                    up[i] = grad[i] * value
            store(a, 6, code, start, n, gate)
            store(a, 7, code, start, n, up)
        low = take(a)
