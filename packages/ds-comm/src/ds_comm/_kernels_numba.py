"""The one-pass sums in numba: imported only when numba is installed, by ``ds_comm.kernels``.

Each kernel walks the output once in blocks that stay in the first-level cache: the block of the first row is widened to
fp32, the same block of every further row is added in row order, then the block is scaled, added to or stored. 16-bit
inputs arrive as their bits (uint16). No fast-math and no fused multiply-add: the bits are those of the torch fallback.
The compiled code is cached on disk, so the first call on a machine costs a second and later ones nothing.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_BLOCK = 2048  # fp32 elements: 8 KiB, a quarter of the smallest common L1 data cache


@intrinsic
def _as_float(_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float: one instruction at most, and the loop around it still vectorises."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(_context: Any, value: Any) -> Any:
    """Reinterpret a float as its 32 bits."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def _from_bf16(half: int) -> Any:
    return _as_float(np.uint32(half) << np.uint32(16))


@njit(inline="always")
def _to_bf16(value: Any) -> Any:
    """Round to nearest even; a NaN stays one (rounding its bits could carry it to infinity)."""
    bits = _as_bits(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@njit(inline="always")
def _from_fp16(half: int) -> Any:
    """Exact widening; subnormals by integer conversion, so a flush-to-zero mode cannot touch them."""
    bits = np.uint32(half)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    exponent = bits & np.uint32(0x7C00)
    mantissa = bits & np.uint32(0x03FF)
    wide = ((bits & np.uint32(0x7FFF)) << np.uint32(13)) + np.uint32(112 << 23)
    special = np.uint32(0x7F800000) | (mantissa << np.uint32(13))
    tiny = _as_bits(np.float32(np.int32(mantissa)) * np.float32(2.0**-24))
    picked = special if exponent == np.uint32(0x7C00) else (tiny if exponent == np.uint32(0) else wide)
    return _as_float(picked | sign)


@njit(inline="always")
def _to_fp16(value: Any) -> Any:
    """Round to nearest even, overflow to infinity, subnormals kept; a NaN stays one."""
    bits = _as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    to_even = np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
    normal = (size - np.uint32(112 << 23) + to_even) >> np.uint32(13)
    # adding 0.5 puts the unit of fp16's subnormals (2**-24) in the last place of the sum, which the addition rounds to
    tiny = _as_bits(_as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    picked = tiny if size < np.uint32(0x38800000) else normal
    picked = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else picked
    picked = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else picked
    return np.uint16(picked | sign)


@njit(inline="always")
def _scale_block(acc: Any, width: int, scale: np.float32) -> None:
    if scale != np.float32(1.0):
        for i in range(width):
            acc[i] *= scale


@njit(inline="always")
def _store_fp32(acc: Any, width: int, out: Any, accumulate: bool) -> None:
    if accumulate:
        for i in range(width):
            out[i] += acc[i]
    else:
        for i in range(width):
            out[i] = acc[i]


@njit(inline="always")
def _sum_block(rows: Any, is_bf16: bool, num_rows: int, stride: int, start: int, width: int, acc: Any) -> None:
    # every loop below runs over a slice from 0: an index that is plainly not negative is what lets LLVM vectorise
    for row in range(num_rows):
        base = row * stride + start
        piece = rows[base : base + width]
        if is_bf16:
            if row == 0:
                for i in range(width):
                    acc[i] = _from_bf16(piece[i])
            else:
                for i in range(width):
                    acc[i] += _from_bf16(piece[i])
        elif row == 0:
            for i in range(width):
                acc[i] = _from_fp16(piece[i])
        else:
            for i in range(width):
                acc[i] += _from_fp16(piece[i])


@njit(nogil=True, cache=True)
def sum16_to_fp32(
    rows: Any, is_bf16: bool, num_rows: int, stride: int, out: Any, accumulate: bool, scale: np.float32
) -> None:
    acc = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        width = min(_BLOCK, out.size - start)
        _sum_block(rows, is_bf16, num_rows, stride, start, width, acc)
        _scale_block(acc, width, scale)
        _store_fp32(acc, width, out[start : start + width], accumulate)


@njit(nogil=True, cache=True)
def sum16_to_16(rows: Any, is_bf16: bool, num_rows: int, stride: int, out: Any, scale: np.float32) -> None:
    acc = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        width = min(_BLOCK, out.size - start)
        _sum_block(rows, is_bf16, num_rows, stride, start, width, acc)
        _scale_block(acc, width, scale)
        target = out[start : start + width]
        if is_bf16:
            for i in range(width):
                target[i] = _to_bf16(acc[i])
        else:
            for i in range(width):
                target[i] = _to_fp16(acc[i])


@njit(nogil=True, cache=True)
def sum32_to_fp32(rows: Any, num_rows: int, stride: int, out: Any, accumulate: bool, scale: np.float32) -> None:
    acc = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        width = min(_BLOCK, out.size - start)
        for row in range(num_rows):
            base = row * stride + start
            piece = rows[base : base + width]
            if row == 0:
                for i in range(width):
                    acc[i] = piece[i]
            else:
                for i in range(width):
                    acc[i] += piece[i]
        _scale_block(acc, width, scale)
        _store_fp32(acc, width, out[start : start + width], accumulate)
