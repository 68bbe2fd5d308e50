"""Sums of squares in numba: imported only when numba is installed, by ds_zero._norm.

One pass at memory speed: each element is widened to fp64, squared and added. The compiler may reorder the fp64 sum
(that is what vectorises it); see the docstring of _norm for what that means to the result.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

REORDER = {"reassoc", "contract"}


@intrinsic
def _as_float(_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(nogil=True, cache=True, fastmath=REORDER)
def sum_of_squares_fp32(values: Any) -> float:
    """values: 1-D float32."""
    total = 0.0
    for i in range(values.size):
        wide = np.float64(values[i])
        total += wide * wide
    return total


@njit(nogil=True, cache=True, fastmath=REORDER)
def sum_of_squares_bf16(bits: Any) -> float:
    """bits: 1-D uint16, the bits of bf16 values."""
    total = 0.0
    for i in range(bits.size):
        wide = np.float64(_as_float(np.uint32(bits[i]) << np.uint32(16)))
        total += wide * wide
    return total
