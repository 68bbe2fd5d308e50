"""Functions of fp32 numbers that LLVM can vectorise; numba's own call the C library for one number at a time.

Everything is inlined. Like `intrinsics`, invisible to numba's disk cache: after editing, delete *.nbi and *.nbc.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import as_float

__all__ = ["exp"]


@njit(inline="always")
def exp(x):
    """e^x in fp32 to about 2 ulp: 2^n times a polynomial (Cephes `expf`). 0 below -87.3, infinity above 88.7."""
    scaled = np.float32(x * np.float32(1.4426950408889634))
    scaled = min(max(scaled, np.float32(-127.0)), np.float32(128.0))
    n = np.int32(scaled + (np.float32(0.5) if scaled > np.float32(0.0) else np.float32(-0.5)))
    whole = np.float32(n)
    f = np.float32(np.float32(x - whole * np.float32(0.693359375)) - whole * np.float32(-2.12194440e-4))
    p = np.float32(1.9875691500e-4)
    p = np.float32(p * f + np.float32(1.3981999507e-3))
    p = np.float32(p * f + np.float32(8.3334519073e-3))
    p = np.float32(p * f + np.float32(4.1665795894e-2))
    p = np.float32(p * f + np.float32(1.6666665459e-1))
    p = np.float32(p * f + np.float32(5.0000001201e-1))
    y = np.float32(np.float32(p * f * f + f) + np.float32(1.0))
    y = np.float32(y * as_float(np.uint32(np.int32(n + np.int32(127)) << np.int32(23))))
    y = np.float32(0.0) if x < np.float32(-87.33654) else y
    return np.float32(np.inf) if x > np.float32(88.72283) else y
