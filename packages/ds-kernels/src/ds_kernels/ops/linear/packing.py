"""Vector code around the products of `vector`: activations become digits on the way in, sums are rounded at the end.

Numba intrinsics over addresses (int64), which check nothing. Element counts are multiples of 32, except where a panel's
16 lanes are meant.
"""
# mypy: disable-error-code="import-untyped,misc,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ds_kernels.ops.linear.vector import FLOATS, I8, I16, I32, I64, INTS, LANES, LINE, Emitter

__all__ = ["copy_line", "digits", "largest_bits", "round_lanes"]

BF16, FP16 = 1, 2


@intrinsic
def largest_bits(_context, values, count):
    """The largest magnitude among fp32 values, as bits: they order as the magnitudes do, and a NaN is the largest."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        e = Emitter(context, builder)

        def step(index: Any, highest: list[Any]) -> list[Any]:
            after = []
            for half, most in enumerate(highest):
                place = e.at(builder.add(args[0], builder.shl(index, I64(2))), LINE * half)
                bits = builder.and_(e.load(place, INTS, 4), e.ints(0x7FFFFFFF))
                after.append(builder.select(builder.icmp_signed(">", bits, most), bits, most))
            return after

        one, two = e.loop(args[1], 2 * LANES, [ir.Constant(INTS, None)] * 2, step)
        most = builder.select(builder.icmp_signed(">", one, two), one, two)
        return e.call("llvm.vector.reduce.umax.v16i32", I32, most)

    return types.uint32(values, count), codegen


@intrinsic(prefer_literal=True)
def digits(_context, planes, values, count, inverse, words, step, amounts):
    """Split rint(value * inverse) into `planes` (a literal) digits of 8 bits with signs, the lowest first.

    The digits of four neighbouring values make a word: the words of plane 0 lie `step` bytes apart from `words` on,
    those of the next plane 4 bytes behind them. amounts[plane] (int32) becomes the sum of that plane's digits. A NaN
    counts as zero.
    """
    num = planes.literal_value

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _, values, count, inverse, words, step, amounts = args
        e = Emitter(context, builder)
        factor = e.splat(inverse)

        def body(index: Any, sums: list[Any]) -> list[Any]:
            scaled = builder.fmul(e.load(builder.add(values, builder.shl(index, I64(2))), FLOATS, 4), factor)
            whole = builder.fptosi(e.call("llvm.rint.v16f32", FLOATS, scaled), INTS)
            rest = builder.select(builder.fcmp_ordered("ord", scaled, scaled), whole, e.ints(0))
            after, quads = [], []
            for plane in range(num):
                low = builder.ashr(builder.shl(rest, e.ints(24)), e.ints(24))
                after.append(builder.add(sums[plane], low))
                octets = builder.trunc(rest, ir.VectorType(I8, LANES))
                quads.append(builder.bitcast(octets, ir.VectorType(I32, LANES // 4)))
                if plane + 1 < num:
                    rest = builder.ashr(builder.sub(rest, low), e.ints(8))
            place = builder.add(words, builder.mul(builder.lshr(index, I64(2)), step))
            for quad in range(LANES // 4):
                word = ir.Constant(ir.VectorType(I32, num), ir.Undefined)
                for plane in range(num):
                    word = builder.insert_element(word, builder.extract_element(quads[plane], I32(quad)), I32(plane))
                e.store(builder.add(place, builder.mul(step, I64(quad))), word)
            return after

        for plane, total in enumerate(e.loop(count, LANES, [ir.Constant(INTS, None)] * num, body)):
            e.store(e.at(amounts, 4 * plane), e.call("llvm.vector.reduce.add.v16i32", I32, total))
        return context.get_dummy_value()

    return types.void(planes, values, count, types.float32, words, step, amounts), codegen


@intrinsic(prefer_literal=True)
def round_lanes(_context, code, values, shift, out):
    """out[16] = values + shift (16 fp32 each), rounded to the dtype of a code (a literal) as by `intrinsics.store`."""
    dtype = code.literal_value

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        e = Emitter(context, builder)
        total = builder.fadd(e.load(args[1], FLOATS, 4), e.load(args[2], FLOATS, 4))
        if dtype == BF16:
            bits = builder.bitcast(total, INTS)
            odd = builder.and_(builder.lshr(bits, e.ints(16)), e.ints(1))
            rounded = builder.lshr(builder.add(builder.add(bits, e.ints(0x7FFF)), odd), e.ints(16))
            is_number = builder.fcmp_ordered("ord", total, total)
            total = builder.trunc(builder.select(is_number, rounded, e.ints(0x7FC0)), ir.VectorType(I16, LANES))
        elif dtype == FP16:
            total = builder.fptrunc(total, ir.VectorType(ir.HalfType(), LANES))
        pointer = builder.inttoptr(args[3], total.type.as_pointer())
        builder.store(total, pointer).align = 2 if dtype else 4
        return context.get_dummy_value()

    return types.void(code, values, shift, out), codegen


@intrinsic
def copy_line(_context, source, target):
    """Copy 64 bytes."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        e = Emitter(context, builder)
        e.store(args[1], e.load(args[0], INTS, 1))
        return context.get_dummy_value()

    return types.void(source, target), codegen
