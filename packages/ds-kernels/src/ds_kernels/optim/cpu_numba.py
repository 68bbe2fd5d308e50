"""The loops of the optimizers: blocks of the flat tensors, widened to fp32 in L1 where they are 16-bit.

Vocabulary: an item is `ITEM` elements, worked through in blocks of `BLOCK`. fp32 tensors are updated in place; others
go through a scratch block and are rounded on the way back: to nearest even, or stochastically (`stochastic` != 0; bf16
only) with 16 random bits from a hash of (seed, stream, element).

The update formulas are rounded operation by operation: no fused multiply-add, which the compiler would place otherwise
in the vector loop than in its remainder, and otherwise in code that it has just made than in code from the cache. So
every element has the same bits wherever it lies in a tensor and however the tensor is cut: a shard computes what the
whole would. Sums are in fp64.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import (
    BF16,
    F32,
    as_bits,
    f32_array,
    f64_array,
    float_at,
    load,
    store,
    take,
    total,
    u16_array,
)
from ds_kernels._cpu.launch import kernel

__all__ = ["ITEM", "adagrad", "adam", "lamb_apply", "lamb_moments", "lion", "sgd"]

ITEM = 1 << 16
"""Elements per work item."""
BLOCK = 1 << 10
"""Elements in flight where some are widened: five scratch blocks are 20 KiB."""
EXACT = False
"""No liberties in the update formulas. It has to be said: a function inherits the fast-math of the kernel it is in."""


@njit(inline="always")
def _opened(a, slot, code, start, n, scratch):
    """Elements as fp32: the tensor's own memory if it is fp32, else a widened copy."""
    if code == F32:
        block = f32_array(a, slot, start + n)[start:]
    else:
        load(a, slot, code, start, n, scratch)
        block = scratch
    return block


@njit(inline="never")
def _scatter_bf16(out, values, n, first, seed):
    for i in range(n):
        # numba widens products of uint32: every one is cut back, which also keeps the loop in 32-bit lanes
        h = np.uint32(np.uint32(np.uint32(first + i) * np.uint32(0x9E3779B9)) + seed)
        h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x7FEB352D))
        h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(15))) * np.uint32(0x846CA68B))
        h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
        bits = as_bits(values[i])
        rounded = np.uint32(bits + (h & np.uint32(0xFFFF))) >> np.uint32(16)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@njit(inline="always")
def _closed(a, slot, code, start, n, values, stochastic, seed):
    """Write back what `_opened` gave."""
    if code != F32:
        if stochastic != 0 and code == BF16:
            _scatter_bf16(u16_array(a, slot, start + n)[start:], values, n, start, np.uint32(seed))
        else:
            store(a, slot, code, start, n, values)


@njit(inline="always")
def _block(widened):
    """Elements per block: the whole item if all tensors are fp32."""
    return ITEM if widened == 0 else BLOCK


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _adam(p, g, m, v, n, scale, beta1, beta2, decay, keep, size, root, eps):
    rest1, rest2 = np.float32(1.0) - beta1, np.float32(1.0) - beta2
    for i in range(n):
        grad = g[i] * scale + decay * p[i]
        mean = beta1 * m[i] + rest1 * grad
        square = beta2 * v[i] + rest2 * grad * grad
        m[i] = mean
        v[i] = square
        p[i] = keep * p[i] - size * mean / (root * np.sqrt(square) + eps)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _adam_moments(p, g, m, v, n, scale, beta1, beta2, decay):
    rest1, rest2 = np.float32(1.0) - beta1, np.float32(1.0) - beta2
    for i in range(n):
        grad = g[i] * scale + decay * p[i]
        m[i] = beta1 * m[i] + rest1 * grad
        v[i] = beta2 * v[i] + rest2 * grad * grad


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _amsgrad(p, m, v, x, n, keep, size, root, eps):
    for i in range(n):
        square = v[i] if v[i] > x[i] or v[i] != v[i] else x[i]
        x[i] = square
        p[i] = keep * p[i] - size * m[i] / (root * np.sqrt(square) + eps)


@kernel
def adam(a):
    """Slots: p g m v x out numel | codes p g m v out | has_x has_out stochastic seed | the formula's numbers."""
    numel, cp, cg, cm, cv, co = a[9], a[10], a[11], a[12], a[13], a[14]
    has_x, has_out, stochastic, seed = a[15], a[16], a[17], a[18]
    scale, beta1, beta2 = np.float32(float_at(a, 19)), np.float32(float_at(a, 20)), np.float32(float_at(a, 21))
    decay, keep, size = np.float32(float_at(a, 22)), np.float32(float_at(a, 23)), np.float32(float_at(a, 24))
    root, eps = np.float32(float_at(a, 25)), np.float32(float_at(a, 26))
    block = _block(cp + cg + cm + cv)
    sp, sg = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sm, sv, sx = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), block):
            n = min(block, min((item + 1) * ITEM, numel) - start)
            p, g = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cg, start, n, sg)
            m, v = _opened(a, 5, cm, start, n, sm), _opened(a, 6, cv, start, n, sv)
            if has_x != 0:
                x = _opened(a, 7, cv, start, n, sx)
                _adam_moments(p, g, m, v, n, scale, beta1, beta2, decay)
                _amsgrad(p, m, v, x, n, keep, size, root, eps)
                _closed(a, 7, cv, start, n, x, stochastic, seed + 3)
            else:
                _adam(p, g, m, v, n, scale, beta1, beta2, decay, keep, size, root, eps)
            _closed(a, 3, cp, start, n, p, stochastic, seed)
            _closed(a, 5, cm, start, n, m, stochastic, seed + 1)
            _closed(a, 6, cv, start, n, v, stochastic, seed + 2)
            if has_out != 0:
                store(a, 8, co, start, n, p)
        item = take(a)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _adagrad(p, g, s, n, scale, decay, lr, eps):
    for i in range(n):
        grad = g[i] * scale + decay * p[i]
        square = s[i] + grad * grad
        s[i] = square
        p[i] = p[i] - lr * grad / (np.sqrt(square) + eps)


@kernel
def adagrad(a):
    """Slots: p g s out numel | codes p g s out | has_out stochastic seed | scale decay lr eps."""
    numel, cp, cg, cs, co = a[7], a[8], a[9], a[10], a[11]
    has_out, stochastic, seed = a[12], a[13], a[14]
    scale, decay = np.float32(float_at(a, 15)), np.float32(float_at(a, 16))
    lr, eps = np.float32(float_at(a, 17)), np.float32(float_at(a, 18))
    block = _block(cp + cg + cs)
    sp, sg, ss = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), block):
            n = min(block, min((item + 1) * ITEM, numel) - start)
            p, g = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cg, start, n, sg)
            s = _opened(a, 5, cs, start, n, ss)
            _adagrad(p, g, s, n, scale, decay, lr, eps)
            _closed(a, 3, cp, start, n, p, stochastic, seed)
            _closed(a, 5, cs, start, n, s, stochastic, seed + 1)
            if has_out != 0:
                store(a, 6, co, start, n, p)
        item = take(a)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _lion(p, g, m, n, scale, beta1, beta2, keep, lr):
    rest1, rest2 = np.float32(1.0) - beta1, np.float32(1.0) - beta2
    for i in range(n):
        grad = g[i] * scale
        c = beta1 * m[i] + rest1 * grad
        m[i] = beta2 * m[i] + rest2 * grad
        up = np.float32(1.0) if c > np.float32(0.0) else np.float32(0.0)
        down = np.float32(1.0) if c < np.float32(0.0) else np.float32(0.0)
        p[i] = keep * p[i] - lr * (up - down)


@kernel
def lion(a):
    """Slots: p g m out numel | codes p g m out | has_out stochastic seed | scale beta1 beta2 keep lr."""
    numel, cp, cg, cm, co = a[7], a[8], a[9], a[10], a[11]
    has_out, stochastic, seed = a[12], a[13], a[14]
    scale, beta1, beta2 = np.float32(float_at(a, 15)), np.float32(float_at(a, 16)), np.float32(float_at(a, 17))
    keep, lr = np.float32(float_at(a, 18)), np.float32(float_at(a, 19))
    block = _block(cp + cg + cm)
    sp, sg, sm = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), block):
            n = min(block, min((item + 1) * ITEM, numel) - start)
            p, g = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cg, start, n, sg)
            m = _opened(a, 5, cm, start, n, sm)
            _lion(p, g, m, n, scale, beta1, beta2, keep, lr)
            _closed(a, 3, cp, start, n, p, stochastic, seed)
            _closed(a, 5, cm, start, n, m, stochastic, seed + 1)
            if has_out != 0:
                store(a, 6, co, start, n, p)
        item = take(a)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _sgd(p, g, b, n, scale, decay, momentum, rest, ahead, behind, lr):
    for i in range(n):
        grad = g[i] * scale + decay * p[i]
        buffer = momentum * b[i] + rest * grad
        b[i] = buffer
        p[i] = p[i] - lr * (ahead * grad + behind * buffer)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _sgd_plain(p, g, n, scale, decay, lr):
    for i in range(n):
        p[i] = p[i] - lr * (g[i] * scale + decay * p[i])


@kernel
def sgd(a):
    """Slots: p g b out numel | codes p g b out | has_b has_out stochastic seed | the formula's numbers."""
    numel, cp, cg, cb, co = a[7], a[8], a[9], a[10], a[11]
    has_b, has_out, stochastic, seed = a[12], a[13], a[14], a[15]
    scale, decay, momentum = np.float32(float_at(a, 16)), np.float32(float_at(a, 17)), np.float32(float_at(a, 18))
    rest, ahead = np.float32(float_at(a, 19)), np.float32(float_at(a, 20))
    behind, lr = np.float32(float_at(a, 21)), np.float32(float_at(a, 22))
    block = _block(cp + cg + cb)
    sp, sg, sb = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), block):
            n = min(block, min((item + 1) * ITEM, numel) - start)
            p, g = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cg, start, n, sg)
            if has_b != 0:
                b = _opened(a, 5, cb, start, n, sb)
                _sgd(p, g, b, n, scale, decay, momentum, rest, ahead, behind, lr)
                _closed(a, 5, cb, start, n, b, stochastic, seed + 1)
            else:
                _sgd_plain(p, g, n, scale, decay, lr)
            _closed(a, 3, cp, start, n, p, stochastic, seed)
            if has_out != 0:
                store(a, 6, co, start, n, p)
        item = take(a)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _lamb_direction(p, m, v, u, n, size, root, eps, inside, decay):
    """u = size m / (root sqrt(v) + eps) + decay p; eps inside the root: size m / (root sqrt(v + inside)) + decay p."""
    for i in range(n):
        u[i] = size * m[i] / (root * np.sqrt(v[i] + inside) + eps) + decay * p[i]


@njit(forceinline=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
def _sum_of_squares(x, n):
    found = np.float64(0.0)
    for i in range(n):
        found += np.float64(x[i]) * np.float64(x[i])
    return found


@kernel
def lamb_moments(a):
    """Slots: p g m v sums numel | codes p g m v | stochastic seed | numbers. sums: fp64 [items, 2] of p^2 and u^2."""
    numel, cp, cg, cm, cv = a[8], a[9], a[10], a[11], a[12]
    stochastic, seed = a[13], a[14]
    scale, beta1, beta2 = np.float32(float_at(a, 15)), np.float32(float_at(a, 16)), np.float32(float_at(a, 17))
    size, root, eps = np.float32(float_at(a, 18)), np.float32(float_at(a, 19)), np.float32(float_at(a, 20))
    inside, decay = np.float32(float_at(a, 21)), np.float32(float_at(a, 22))
    sums = f64_array(a, 7, 2 * total(a))
    sp, sg, su = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sm, sv = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        of_p, of_u = np.float64(0.0), np.float64(0.0)
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), BLOCK):
            n = min(BLOCK, numel - start)
            p, g = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cg, start, n, sg)
            m, v = _opened(a, 5, cm, start, n, sm), _opened(a, 6, cv, start, n, sv)
            _adam_moments(p, g, m, v, n, scale, beta1, beta2, np.float32(0.0))
            _lamb_direction(p, m, v, su, n, size, root, eps, inside, decay)
            of_p += _sum_of_squares(p, n)
            of_u += _sum_of_squares(su, n)
            _closed(a, 5, cm, start, n, m, stochastic, seed + 1)
            _closed(a, 6, cv, start, n, v, stochastic, seed + 2)
        sums[2 * item] = of_p
        sums[2 * item + 1] = of_u
        item = take(a)


@njit(inline="never", fastmath=EXACT, error_model="numpy")
def _descend(p, u, n, step):
    for i in range(n):
        p[i] = p[i] - step * u[i]


@kernel
def lamb_apply(a):
    """Slots: p m v out numel | codes p m v out | has_out stochastic seed | step size root eps inside decay."""
    numel, cp, cm, cv, co = a[7], a[8], a[9], a[10], a[11]
    has_out, stochastic, seed = a[12], a[13], a[14]
    step, size, root = np.float32(float_at(a, 15)), np.float32(float_at(a, 16)), np.float32(float_at(a, 17))
    eps, inside, decay = np.float32(float_at(a, 18)), np.float32(float_at(a, 19)), np.float32(float_at(a, 20))
    sp, su = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sm, sv = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    item = take(a)
    while item < total(a):
        for start in range(item * ITEM, min((item + 1) * ITEM, numel), BLOCK):
            n = min(BLOCK, numel - start)
            p, m = _opened(a, 3, cp, start, n, sp), _opened(a, 4, cm, start, n, sm)
            v = _opened(a, 5, cv, start, n, sv)
            _lamb_direction(p, m, v, su, n, size, root, eps, inside, decay)
            _descend(p, su, n, step)
            _closed(a, 3, cp, start, n, p, stochastic, seed)
            if has_out != 0:
                store(a, 6, co, start, n, p)
        item = take(a)
