"""Elementary functions that numba vectorises: exp, the sigmoid, the normal distribution, a hash as random numbers.

numba calls libm for `math.exp`, one element at a time, which is several times slower than memory. These are inlined
into the kernel's loop as branch-free arithmetic on fp32, accurate to about one unit in the last place (exp and what is
made of it: 2e-7 relative). NaN stays NaN; infinities and overflow give what the mathematics says.

Sources: exp: the polynomial of Moshier's Cephes library. The error function: the rational minimax approximation on
[-4, 4] that Eigen and XLA use. The hash: Wellons' "lowbias32".
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["exp", "mix", "normal_cdf", "normal_pdf", "ratio", "sigmoid", "tanh"]

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_TOP = np.float32(88.3762)
_BOTTOM = np.float32(-87.3365)
_INFINITY = np.float32(np.inf)
_STEEP = np.float32(7.90531110763549805)
_SQRT_HALF = np.float32(0.7071067811865476)
_FAR = np.float32(4.0)
_PEAK = np.float32(0.3989422804014327)


@intrinsic
def _round(_context: Any, x: Any) -> Any:
    """The nearest whole number."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.nearbyint", [ir.FloatType()]), [args[0]])

    return types.float32(types.float32), codegen


@intrinsic
def _fma(_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def ratio(_context: Any, x: Any, y: Any) -> Any:
    """x / y, infinity or NaN for y = 0: Python's division looks for a zero each time, which stops vectorisation."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def _two_to(_context: Any, n: Any) -> Any:
    """2^n for a whole number n in [-126, 127]."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        exponent = builder.add(builder.fptosi(args[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


@intrinsic
def mix(_context: Any, word: Any) -> Any:
    """A permutation of the 32-bit words in which every input bit flips every output bit about half of the time."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        kind, x = ir.IntType(32), args[0]
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = builder.mul(builder.xor(x, builder.lshr(x, ir.Constant(kind, shift))), ir.Constant(kind, factor))
        return builder.xor(x, builder.lshr(x, ir.Constant(kind, 16)))

    return types.uint32(types.uint32), codegen


@njit(inline="always")
def exp(x):
    """e^x: 0 below -87.34 (results that would be denormal), infinity above 88.37."""
    low = _BOTTOM if x < _BOTTOM else x
    inside = _TOP if low > _TOP else low
    n = _round(np.float32(inside * _LOG2_E))
    r = _fma(-n, _LN_2, inside)
    p = _fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = _fma(p, r, np.float32(8.3334519073e-3))
    p = _fma(p, r, np.float32(4.1665795894e-2))
    p = _fma(p, r, np.float32(1.6666665459e-1))
    p = _fma(p, r, np.float32(5.0000001201e-1))
    value = np.float32(_fma(np.float32(p * r), r, np.float32(r + np.float32(1.0))) * _two_to(n))
    above = _INFINITY if x > _TOP else value
    return np.float32(0.0) if x < _BOTTOM else above


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return ratio(np.float32(1.0), np.float32(np.float32(1.0) + exp(np.float32(-x))))


@njit(inline="always")
def tanh(x):
    """(e^x - e^-x) / (e^x + e^-x), by the rational approximation that Eigen uses."""
    low = -_STEEP if x < -_STEEP else x
    near = _STEEP if low > _STEEP else low
    s = np.float32(near * near)
    p = _fma(np.float32(-2.76076847742355e-16), s, np.float32(2.00018790482477e-13))
    p = _fma(p, s, np.float32(-8.60467152213735e-11))
    p = _fma(p, s, np.float32(5.12229709037114e-08))
    p = _fma(p, s, np.float32(1.48572235717979e-05))
    p = _fma(p, s, np.float32(6.37261928875436e-04))
    p = _fma(p, s, np.float32(4.89352455891786e-03))
    q = _fma(np.float32(1.19825839466702e-06), s, np.float32(1.18534705686654e-04))
    q = _fma(q, s, np.float32(2.26843463243900e-03))
    q = _fma(q, s, np.float32(4.89352518554385e-03))
    return ratio(np.float32(near * p), q)


@njit(inline="always")
def normal_pdf(x):
    """e^(-x^2 / 2) / sqrt(2 pi)."""
    return np.float32(_PEAK * exp(np.float32(np.float32(-0.5) * x * x)))


@njit(inline="always")
def normal_cdf(x):
    """(1 + erf(x / sqrt(2))) / 2, to 2e-7 absolute; exactly 0 and 1 beyond |x| = 5.66."""
    z = np.float32(x * _SQRT_HALF)
    low = -_FAR if z < -_FAR else z
    near = _FAR if low > _FAR else low
    s = np.float32(near * near)
    p = _fma(np.float32(-2.72614225801306e-10), s, np.float32(2.77068142495902e-08))
    p = _fma(p, s, np.float32(-2.10102402082508e-06))
    p = _fma(p, s, np.float32(-5.69250639462346e-05))
    p = _fma(p, s, np.float32(-7.34990630326855e-04))
    p = _fma(p, s, np.float32(-2.95459980854025e-03))
    p = _fma(p, s, np.float32(-1.60960333262415e-02))
    q = _fma(np.float32(-1.45660718464996e-05), s, np.float32(-2.13374055278905e-04))
    q = _fma(q, s, np.float32(-1.68282697438203e-03))
    q = _fma(q, s, np.float32(-7.37332916720468e-03))
    q = _fma(q, s, np.float32(-1.42647390514189e-02))
    middle = _fma(ratio(np.float32(near * p), q), np.float32(0.5), np.float32(0.5))
    below = np.float32(0.0) if z < -_FAR else middle
    return np.float32(1.0) if z > _FAR else below
