"""What kernels of `launch` are written with: slots, arrays over raw pointers, the hand-out of items, 16-bit floats.

Everything is inlined into the kernel. Arrays are views without bounds checks; their element counts are the kernel's
responsibility. 16-bit floats are arrays of uint16: `bf16` widens exactly and rounds to nearest even as torch does.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def,type-arg"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

__all__ = [
    "as_bits", "as_float", "bf16_to_f32", "f32_array", "f32_at", "f32_to_bf16", "f32_to_fp16", "f64_array", "float_at",
    "fp16_to_f32", "grain", "i8_array", "i32_array", "i32_at", "i64_array", "i64_at", "load", "load_at", "load_sum",
    "store", "store_at", "take", "total", "u8_array", "u8_at", "u16_array", "u16_at", "u32_array",
]  # fmt: skip

BF16, FP16, F32 = 1, 2, 0
"""Dtype codes that `load` and `store` take; `ds_kernels._cpu.dtypes.CODES` gives a tensor's."""


def _pointer_cast(pointee: Any, llvm: Any) -> Any:
    @intrinsic
    def cast(_context: Any, address: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], llvm.as_pointer())

        return types.CPointer(pointee)(types.int64), codegen

    return cast


def _array_of(pointee: Any, llvm: Any) -> Any:
    """A function `(a, slot, numel)`: the array of one element type whose address is in a slot."""
    pointer = _pointer_cast(pointee, llvm)

    @njit(inline="always")
    def array(a, slot, numel):
        return carray(pointer(a[slot]), numel)

    return array


def _array_at(pointee: Any, llvm: Any) -> Any:
    """A function `(address, numel)`: the array of one element type at an address."""
    pointer = _pointer_cast(pointee, llvm)

    @njit(inline="always")
    def array(address, numel):
        return carray(pointer(address), numel)

    return array


f32_at = _array_at(types.float32, ir.FloatType())
i32_at = _array_at(types.int32, ir.IntType(32))
i64_at = _array_at(types.int64, ir.IntType(64))
u8_at = _array_at(types.uint8, ir.IntType(8))
u16_at = _array_at(types.uint16, ir.IntType(16))
f32_array = _array_of(types.float32, ir.FloatType())
f64_array = _array_of(types.float64, ir.DoubleType())
i8_array = _array_of(types.int8, ir.IntType(8))
i32_array = _array_of(types.int32, ir.IntType(32))
i64_array = _array_of(types.int64, ir.IntType(64))
u8_array = _array_of(types.uint8, ir.IntType(8))
u16_array = _array_of(types.uint16, ir.IntType(16))
u32_array = _array_of(types.uint32, ir.IntType(32))


@intrinsic
def _double(_context: Any, bits: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@njit(inline="always")
def float_at(a, slot):
    """The float (fp64) in a slot."""
    return _double(a[slot])


@intrinsic
def _fetch_add(_context: Any, pointer: Any, amount: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@njit(inline="always")
def take(a):
    """The first of the next `grain(a)` items to work on; `>= total(a)` when none is left."""
    return _fetch_add(a, a[2])


@njit(inline="always")
def total(a):
    """The number of items."""
    return a[1]


@njit(inline="always")
def grain(a):
    """How many items `take` hands out at a time."""
    return a[2]


@intrinsic
def as_float(_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def as_bits(_context: Any, value: Any) -> Any:
    """Reinterpret a float as its 32 bits."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _half_to_float(_context: Any, half: Any) -> Any:
    """fp16 bits to fp32 by the hardware's conversion (F16C and its kin)."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _float_to_half(_context: Any, value: Any) -> Any:
    """fp32 to fp16 bits by the hardware's conversion: to nearest even, overflow to infinity."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@njit(inline="always")
def bf16_to_f32(bits):
    """Exact."""
    return as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit(inline="always")
def f32_to_bf16(value):
    """Round to nearest even; a NaN stays one (rounding its bits could carry it to infinity)."""
    bits = as_bits(np.float32(value))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@njit(inline="always")
def fp16_to_f32(bits):
    """Exact."""
    return _half_to_float(np.uint16(bits))


@njit(inline="always")
def f32_to_fp16(value):
    """Round to nearest even, overflow to infinity."""
    return _float_to_half(np.float32(value))


@njit(inline="always")
def load_at(address, code, n, out):
    """Widen n elements of a dtype (code) at an address into the fp32 array `out`."""
    if code == BF16:
        halves = u16_at(address, n)
        for i in range(n):
            out[i] = bf16_to_f32(halves[i])
    elif code == FP16:
        halves = u16_at(address, n)
        for i in range(n):
            out[i] = fp16_to_f32(halves[i])
    else:
        floats = f32_at(address, n)
        for i in range(n):
            out[i] = floats[i]


@njit(inline="always")
def store_at(address, code, n, values):
    """Round the fp32 array `values` into n elements of a dtype (code) at an address."""
    if code == BF16:
        halves = u16_at(address, n)
        for i in range(n):
            halves[i] = f32_to_bf16(values[i])
    elif code == FP16:
        halves = u16_at(address, n)
        for i in range(n):
            halves[i] = f32_to_fp16(values[i])
    else:
        floats = f32_at(address, n)
        for i in range(n):
            floats[i] = values[i]


@njit(inline="always")
def load(a, slot, code, start, n, out):
    """Widen elements [start, start + n) of the tensor in a slot (dtype code) into the fp32 array `out`."""
    if code == BF16:
        halves = u16_array(a, slot, start + n)[start:]
        for i in range(n):
            out[i] = bf16_to_f32(halves[i])
    elif code == FP16:
        halves = u16_array(a, slot, start + n)[start:]
        for i in range(n):
            out[i] = fp16_to_f32(halves[i])
    else:
        floats = f32_array(a, slot, start + n)[start:]
        for i in range(n):
            out[i] = floats[i]


@njit(inline="always")
def store(a, slot, code, start, n, values):
    """Round the fp32 array `values` into elements [start, start + n) of the tensor in a slot (dtype code)."""
    if code == BF16:
        halves = u16_array(a, slot, start + n)[start:]
        for i in range(n):
            halves[i] = f32_to_bf16(values[i])
    elif code == FP16:
        halves = u16_array(a, slot, start + n)[start:]
        for i in range(n):
            halves[i] = f32_to_fp16(values[i])
    else:
        floats = f32_array(a, slot, start + n)[start:]
        for i in range(n):
            floats[i] = values[i]


@njit(inline="always")
def load_sum(a, slot, residual, total, code, start, n, out, scratch):
    """`load`, plus the tensor in slot `residual` unless that is 0: their rounded sum is in slot `total` and `out`."""
    load(a, slot, code, start, n, out)
    if a[residual] != 0:
        load(a, residual, code, start, n, scratch)
        for i in range(n):
            out[i] += scratch[i]
        store(a, total, code, start, n, out)
        load(a, total, code, start, n, out)
