"""The two inner loops of `linear`, emitted as LLVM vector code: numba has no vectors and LLVM would not find these.

`panel_dot` multiplies blocks of 1-8 activation rows, as integers, with one panel of 16 quantised weight rows (layout:
`weight`); `rows_dot` up to eight activation rows with some rows of bf16 weights. Both are numba intrinsics whose
leading arguments are literals: each combination is a loop of its own with all sums in registers.

The products are AVX-512's vpdpbusd (64 products of bytes, VNNI) and vdpbf16ps (32 products of bf16), where the CPU
that numba compiles for has them, else the same from plain vector arithmetic, which any CPU takes. The integer products
are exact, so both ways give `panel_dot` the same bits.
"""
# mypy: disable-error-code="import-untyped,misc,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["FLOATS", "I8", "I16", "I32", "I64", "INTS", "LANES", "LINE", "Emitter", "panel_dot", "rows_dot"]

LANES = 16
"""32-bit lanes of a vector: the weight rows of a panel."""
LINE = 64
"""Bytes of a vector, and of a cache line."""
AHEAD = 8192
"""Bytes of a panel that are prefetched ahead: twice what memory delivers in its own latency, for two small streams."""
UNROLL = 4

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class Emitter:
    """Emits vector instructions at a builder's position."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        features = context.codegen().magic_tuple()[2].split(",")
        self.has_vnni = "+avx512vnni" in features
        self.has_bf16 = "+avx512bf16" in features

    def load(self, address: Any, kind: Any, align: int) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, address: Any, value: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 4

    def at(self, address: Any, nbytes: int) -> Any:
        return self.builder.add(address, I64(nbytes))

    def splat(self, scalar: Any) -> Any:
        kind = ir.VectorType(scalar.type, LANES)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, I32(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * LANES))

    def ints(self, value: int) -> Any:
        return ir.Constant(INTS, [value] * LANES)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        function = self.builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [value.type for value in args])
            function = ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("llvm.fma.v16f32", FLOATS, a, b, c)

    def prefetch(self, address: Any) -> None:
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(2), I32(1))

    def dot_bytes(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """Per lane: total + the four products of unsigned by signed bytes."""
        if self.has_vnni:
            return self.call("llvm.x86.avx512.vpdpbusd.512", INTS, total, unsigned, signed)
        b = self.builder
        for byte in range(4):
            left = b.and_(b.lshr(unsigned, self.ints(8 * byte)), self.ints(255))
            right = b.ashr(b.shl(signed, self.ints(24 - 8 * byte)), self.ints(24))
            total = b.add(total, b.mul(left, right))
        return total

    def dot_bf16(self, total: Any, left: Any, right: Any) -> Any:
        """Per lane: total + the two products of bf16 pairs."""
        if self.has_bf16:
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, left, right)
        for move in (self._low, self._high):
            total = self.fma(move(left), move(right), total)
        return total

    def _low(self, pairs: Any) -> Any:
        return self.builder.bitcast(self.builder.shl(pairs, self.ints(16)), FLOATS)

    def _high(self, pairs: Any) -> Any:
        return self.builder.bitcast(self.builder.and_(pairs, self.ints(-65536)), FLOATS)

    def widen_bf16(self, address: Any) -> Any:
        """16 bf16 in memory as fp32."""
        halves = self.load(address, ir.VectorType(I16, LANES), 2)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(halves, INTS), self.ints(16)), FLOATS)

    def totals(self, vectors: Sequence[Any]) -> Any:
        """A vector whose lane i is the sum of vector i (a power of two of them): neighbours are folded."""
        b = self.builder
        even, odd = (ir.Constant(INTS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
        width = LANES
        while width > 1:
            left, right = vectors[::2], vectors[1::2] or vectors
            vectors = [
                b.fadd(b.shuffle_vector(one, two, even), b.shuffle_vector(one, two, odd))
                for one, two in zip(left, right, strict=True)
            ]
            width //= 2
        return vectors[0]

    def loop(
        self, count: Any, step: int, start: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """`for i in range(0, count, step): values = body(i, values)`; returns the last values."""
        b = self.builder
        entry, head, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", count, I64(0)), head, done)
        b.position_at_end(head)
        index, values = b.phi(I64), [b.phi(value.type) for value in start]
        results = body(index, list(values))
        following, tail = b.add(index, I64(step)), b.block
        b.cbranch(b.icmp_signed("<", following, count), head, done)
        index.add_incoming(I64(0), entry)
        index.add_incoming(following, tail)
        b.position_at_end(done)
        final = [b.phi(value.type) for value in start]
        for value, first, result, last in zip(values, start, results, final, strict=True):
            value.add_incoming(first, entry)
            value.add_incoming(result, tail)
            last.add_incoming(first, entry)
            last.add_incoming(result, tail)
        return final


@intrinsic(prefer_literal=True)
def panel_dot(
    _context, bits, rows, planes, centred, codes, scale, centre, x, meta, groups, depth, group, out
):  # fmt: skip
    """out[rows][16] (fp32) = activations times one panel, summed over all groups.

    Literals: bits of a code (8, 4), activation rows, planes (digits of 8 bits) per activation, whether there are
    centres. Then addresses: codes, scale, centre of the panel; x and meta as `cpu_numba.pack` writes them; and numbers:
    groups, depth (columns, a multiple of 32) and columns per group (likewise).
    """
    num = (bits.literal_value, rows.literal_value, planes.literal_value, bool(centred.literal_value))

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _emit_panel(Emitter(context, builder), *num, *args[4:])
        return context.get_dummy_value()

    return types.void(bits, rows, planes, centred, *([types.int64] * 9)), codegen


def _emit_panel(
    e: Emitter, bits: int, rows: int, planes: int, centred: bool,
    codes: Any, scale: Any, centre: Any, x: Any, meta: Any, groups: Any, depth: Any, group: Any, out: Any,
) -> None:  # fmt: skip
    b, width = e.builder, rows * planes
    meta_nbytes = 4 * (width + 2 * rows)
    column_nbytes = LANES * bits // 8

    def one_group(index: Any, sums: list[Any]) -> list[Any]:
        first = b.mul(index, group)
        left = b.sub(depth, first)
        count = b.select(b.icmp_signed("<", left, group), left, group)
        facts = b.add(meta, b.mul(index, I64(meta_nbytes)))
        start = [e.splat(e.load(e.at(facts, 4 * i), I32, 4)) for i in range(width)]
        begin_codes, begin_x = b.add(codes, b.mul(first, I64(column_nbytes))), b.add(x, b.mul(first, I64(width)))
        dots = _emit_columns(e, bits, width, count, begin_codes, begin_x, start)
        by, plus = e.widen_bf16(b.add(scale, b.mul(index, I64(2 * LANES)))), None
        if centred:
            plus = e.widen_bf16(b.add(centre, b.mul(index, I64(2 * LANES))))
        result = []
        for row in range(rows):
            dot = b.sitofp(dots[row * planes + planes - 1], FLOATS)
            for plane in reversed(range(planes - 1)):
                lower = b.sitofp(dots[row * planes + plane], FLOATS)
                dot = e.fma(dot, ir.Constant(FLOATS, [256.0] * LANES), lower)
            unit = e.splat(e.load(e.at(facts, 4 * (width + row)), F32, 4))
            total = e.fma(b.fmul(dot, unit), by, sums[row])
            if plus is not None:
                amount = e.splat(e.load(e.at(facts, 4 * (width + rows + row)), F32, 4))
                total = e.fma(amount, plus, total)
            result.append(total)
        return result

    sums = e.loop(groups, 1, [ir.Constant(FLOATS, None)] * rows, one_group)
    for row in range(rows):
        e.store(e.at(out, LINE * row), sums[row])


def _emit_columns(
    e: Emitter, bits: int, width: int, count: Any, codes: Any, x: Any, start: list[Any]
) -> list[Any]:  # fmt: skip
    """Sums of products over `count` columns; few sums are kept in two sets, which hides the latency of adding."""
    b = e.builder
    sets = 2 if width <= 4 else 1
    quads = 2 if bits == 4 else 1

    def step(column: Any, totals: list[Any]) -> list[Any]:
        at_codes = b.add(codes, b.mul(column, I64(LANES * bits // 8)))
        at_x = b.add(x, b.mul(column, I64(width)))
        turn = 0
        for line in range(UNROLL):
            stored = e.load(e.at(at_codes, LINE * line), INTS, 1)
            e.prefetch(e.at(at_codes, LINE * line + AHEAD))
            nibbles = e.ints(0x0F0F0F0F)
            parts = (
                [stored] if bits == 8 else [b.and_(stored, nibbles), b.and_(b.lshr(stored, e.ints(4)), nibbles)]
            )  # fmt: skip
            for part in parts:
                offset = turn % sets * width
                for i in range(width):
                    digits = e.splat(e.load(e.at(at_x, 4 * (turn * width + i)), I32, 4))
                    totals[offset + i] = e.dot_bytes(totals[offset + i], part, digits)
                turn += 1
        return totals

    zeros = [ir.Constant(INTS, None)] * (width * (sets - 1))
    totals = e.loop(count, UNROLL * quads * 4, [*start, *zeros], step)
    return totals if sets == 1 else [b.add(totals[i], totals[width + i]) for i in range(width)]


@intrinsic(prefer_literal=True)
def rows_dot(_context, num_weights, rows, weight, stride, ahead, x, chunks, out, out_stride):
    """out[rows][num_weights] (fp32) += activation rows times rows of bf16 weights, which lie `stride` bytes apart.

    Literals: how many of each. x holds the activations as [chunks][rows][32] bf16; columns that do not fill a chunk of
    32 are left to the caller. The weights `ahead` bytes further on are prefetched; the rows of out lie `out_stride`
    bytes apart.
    """
    sizes = (num_weights.literal_value, rows.literal_value)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _emit_rows(Emitter(context, builder), *sizes, *args[2:])
        return context.get_dummy_value()

    return types.void(num_weights, rows, *([types.int64] * 7)), codegen


def _emit_rows(
    e: Emitter, num_weights: int, rows: int,
    weight: Any, stride: Any, ahead: Any, x: Any, chunks: Any, out: Any, out_stride: Any,
) -> None:  # fmt: skip
    b = e.builder
    starts = [b.add(weight, b.mul(stride, I64(i))) for i in range(num_weights)]

    def step(chunk: Any, sums: list[Any]) -> list[Any]:
        offset = b.mul(chunk, I64(LINE))
        at_x = b.add(x, b.mul(chunk, I64(LINE * rows)))
        activations = [e.load(e.at(at_x, LINE * row), INTS, 1) for row in range(rows)]
        for i, begin in enumerate(starts):
            place = b.add(begin, offset)
            pairs = e.load(place, INTS, 1)
            e.prefetch(b.add(place, ahead))
            for row in range(rows):
                total = sums[row * num_weights + i]
                sums[row * num_weights + i] = e.dot_bf16(total, pairs, activations[row])
        return sums

    totals = e.totals(e.loop(chunks, 1, [ir.Constant(FLOATS, None)] * (num_weights * rows), step))
    for row in range(rows):
        mask = ir.Constant(ir.VectorType(I32, num_weights), [row * num_weights + i for i in range(num_weights)])
        part = b.shuffle_vector(totals, totals, mask)
        place = b.add(out, b.mul(out_stride, I64(row)))
        e.store(place, b.fadd(e.load(place, part.type, 4), part))
