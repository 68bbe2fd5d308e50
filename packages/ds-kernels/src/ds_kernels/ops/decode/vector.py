"""The inner loop of decode over dense weights, emitted as LLVM vector code as in `ops.linear.vector`.

`rows_product` multiplies 1-8 activation rows (fp32) with some rows of weights in fp32, bf16 or fp16, which are widened
in registers; all sums stay there. Every sum is a fused multiply-add per lane in the order of the columns, its lanes
folded in one fixed tree: a result does not depend on how many rows are computed beside it.

Activations come packed: [chunks of CHUNK columns][rows][CHUNK] fp32, padded with zeros; in a chunk of bf16 weights the
even columns come before the odd ones, because that is how pairs of bf16 come apart.
"""
# mypy: disable-error-code="import-untyped,misc,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ds_kernels.ops.linear.vector import FLOATS, I16, I32, I64, INTS, LANES, LINE, Emitter

__all__ = ["CHUNK", "WEIGHT_ROWS", "fold", "rows_product", "square_sum", "value_sum"]

CHUNK = 32
"""Columns of a step: two vectors."""
WEIGHT_ROWS = {1: 4, 2: 4, 4: 4, 8: 2}
"""Weight rows of a call by activation rows: no more sums than registers hold, no more streams than memory likes."""
F32, BF16, FP16 = 0, 1, 2


@intrinsic(prefer_literal=True)
def rows_product(_context, code, rows, weight, stride, count, ahead, x, columns, sums):
    """sums[row][i] (vectors of fp32) += packed activations times `count` rows of weights, before the lanes are folded.

    Literals: dtype code of the weights and activation rows. Then addresses and numbers: the first weight row, bytes
    between them, how many there are (up to WEIGHT_ROWS[rows]; sums has room for all), bytes that are prefetched ahead,
    the activations, columns, the sums.
    """
    sizes = (code.literal_value, rows.literal_value)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _emit(Emitter(context, builder), *sizes, *args[2:])
        return context.get_dummy_value()

    return types.void(code, rows, *([types.int64] * 7)), codegen


@intrinsic(prefer_literal=True)
def fold(_context, rows, sums, out, out_stride):
    """out[rows][WEIGHT_ROWS[rows]] (fp32, rows `out_stride` bytes apart) = the lanes of sums, added up."""
    height = rows.literal_value
    num = WEIGHT_ROWS[height]

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        e, (_, sums, out, out_stride) = Emitter(context, builder), args
        totals = e.totals([e.load(e.at(sums, LINE * i), FLOATS, 4) for i in range(num * height)])
        for row in range(height):
            mask = ir.Constant(ir.VectorType(I32, num), [row * num + i for i in range(num)])
            found = builder.shuffle_vector(totals, totals, mask)
            e.store(builder.add(out, builder.mul(out_stride, I64(row))), found)
        return context.get_dummy_value()

    return types.void(rows, sums, out, out_stride), codegen


def _emit(
    e: Emitter, code: int, rows: int,
    weight: Any, stride: Any, count: Any, ahead: Any, x: Any, columns: Any, state: Any,
) -> None:  # fmt: skip
    b, num, size = e.builder, WEIGHT_ROWS[rows], 4 if code == F32 else 2
    last = b.sub(count, I64(1))
    starts = []
    for i in range(num):
        row = b.select(b.icmp_signed("<", I64(i), last), I64(i), last)
        starts.append(b.add(weight, b.mul(stride, row)))

    def body(chunk: Any, sums: list[Any], read: Callable[[Any], tuple[Any, Any]], fetch: bool) -> list[Any]:
        at_x = b.add(x, b.mul(chunk, I64(4 * CHUNK * rows)))
        offset = b.mul(chunk, I64(size * CHUNK))
        for i, start in enumerate(starts):
            place = b.add(start, offset)
            parts = read(place)
            if fetch:
                for line in range(0, size * CHUNK, LINE):
                    e.prefetch(b.add(e.at(place, line), ahead))
            for half, part in enumerate(parts):
                for row in range(rows):
                    left = e.load(e.at(at_x, 4 * CHUNK * row + LINE * half), FLOATS, 4)
                    at = row * num + i
                    sums[at] = e.fma(part, left, sums[at])
        return sums

    chunks = b.lshr(columns, I64(5))
    rest = b.and_(columns, I64(CHUNK - 1))
    before = [e.load(e.at(state, LINE * i), FLOATS, 4) for i in range(num * rows)]
    sums = e.loop(chunks, 1, before, lambda chunk, sums: body(chunk, sums, lambda at: _whole(e, code, at), True))
    entry, tail, done = b.block, b.append_basic_block("tail"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed(">", rest, I64(0)), tail, done)
    b.position_at_end(tail)
    after = body(chunks, list(sums), lambda at: _part(e, code, at, rest), False)
    end = b.block
    b.branch(done)
    b.position_at_end(done)
    for i, (one, other) in enumerate(zip(sums, after, strict=True)):
        final = b.phi(FLOATS)
        final.add_incoming(one, entry)
        final.add_incoming(other, end)
        after[i] = final
    for i, final in enumerate(after):
        e.store(e.at(state, LINE * i), final)


def _whole(e: Emitter, code: int, at: Any) -> tuple[Any, Any]:
    """A chunk of weights as two vectors."""
    if code == BF16:
        return _pairs(e, e.load(at, INTS, 2))
    if code == F32:
        return e.load(at, FLOATS, 4), e.load(e.at(at, LINE), FLOATS, 4)
    halves = ir.VectorType(ir.HalfType(), LANES)
    low, high = e.load(at, halves, 2), e.load(e.at(at, LINE // 2), halves, 2)
    return e.builder.fpext(low, FLOATS), e.builder.fpext(high, FLOATS)


def _pairs(e: Emitter, pairs: Any) -> tuple[Any, Any]:
    low = e.builder.bitcast(e.builder.shl(pairs, e.ints(16)), FLOATS)
    return low, e.builder.bitcast(e.builder.and_(pairs, e.ints(-65536)), FLOATS)


def _part(e: Emitter, code: int, at: Any, count: Any) -> tuple[Any, Any]:
    """The first `count` columns of a chunk, zeros behind them: nothing behind them is read."""
    b = e.builder
    width = I32 if code == F32 else I16
    kind = ir.VectorType(width, CHUNK)
    counts, lanes = ir.VectorType(I32, CHUNK), ir.Constant(ir.VectorType(I32, CHUNK), list(range(CHUNK)))
    nothing = ir.Constant(counts, ir.Undefined)
    first = b.insert_element(nothing, b.trunc(count, I32), I32(0))
    limit = b.shuffle_vector(first, nothing, ir.Constant(counts, [0] * CHUNK))
    mask = b.icmp_signed("<", lanes, limit)
    pointer = b.inttoptr(at, kind.as_pointer())
    name = f"llvm.masked.load.v{CHUNK}i{width.width}.p0"
    values = e.call(name, kind, pointer, I32(width.width // 8), mask, ir.Constant(kind, None))
    if code == BF16:
        return _pairs(e, b.bitcast(values, INTS))
    low, high = (
        b.shuffle_vector(values, values, ir.Constant(INTS, list(range(start, start + LANES)))) for start in (0, LANES)
    )
    if code == F32:
        return b.bitcast(low, FLOATS), b.bitcast(high, FLOATS)
    half = ir.VectorType(ir.HalfType(), LANES)
    return b.fpext(b.bitcast(low, half), FLOATS), b.fpext(b.bitcast(high, half), FLOATS)


def _reduction(square: bool) -> Any:
    @intrinsic
    def reduction(_context, values, count):
        """The sum of `count` fp32 values (squares) at an address, whose last vector is filled up with zeros."""

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            e = Emitter(context, builder)

            def body(index: Any, sums: list[Any]) -> list[Any]:
                found = e.load(builder.add(args[0], builder.shl(index, I64(2))), FLOATS, 4)
                return [e.fma(found, found, sums[0]) if square else builder.fadd(sums[0], found)]

            (total,) = e.loop(args[1], LANES, [ir.Constant(FLOATS, None)], body)
            return builder.extract_element(e.totals([total]), I32(0))

        return types.float32(values, count), codegen

    return reduction


square_sum = _reduction(square=True)
value_sum = _reduction(square=False)
