"""What numba kernels of attention are made of: register tiles of matrix products, and a softmax over columns.

LLVM's vectoriser does not keep a tile of a product in registers; these intrinsics emit it as vectors of 16 fp32 lanes,
which LLVM splits on CPUs with narrower ones. They work on addresses (int64) of fp32, count strides in elements of four
bytes and check nothing. All matrices have the rows of the problem (queries) along the lanes, so that reductions over
keys are plain vector operations.

    tile_f32        c[i, j] += sum over k of a[i, k] * b[k, j]   for ROWS rows i and 32 columns j
    tile_bf16       the same where a and b hold *pairs*: uint32 of two bf16 with successive k, the lower one first;
                    needs HAS_BF16_DOT (x86's AVX512_BF16: exact products, fp32 sums, tiny values flushed to zero)
    column_max      x *= factor; the running maximum m of 16 columns, the sums so far shrunk to it, and by how much
    column_exp      x = 2^(x - m); the running sum of 16 columns; `column_exp_pairs` writes x as pairs of bf16
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def,type-arg"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "Code", "HAS_BF16_DOT", "LANES", "ROWS", "column_exp", "column_exp_pairs", "column_max", "tile_bf16", "tile_f32",
]  # fmt: skip

HAS_BF16_DOT: bool = bool(binding.get_host_cpu_features().get("avx512bf16"))
"""Whether `tile_bf16` can be compiled here."""

LANES = 16
ROWS = 8
"""Rows of a tile: with two vectors of 16 lanes each, 16 accumulators."""

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
ZERO = ir.Constant(VECTOR, None)
_EXP2 = (1.0, 0.6931472067028329, 0.24022650922289554, 0.05550327226669895,
         0.00961805667843204, 0.0013400428177711937, 0.00015461444724808513)  # fmt: skip
"""2^x for |x| <= 1/2, by powers of x: interpolated in Chebyshev points, relative error 3e-9."""


class Code:
    """A builder with what the intrinsics share."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def address(self, base: Any, offset: Any, llvm: Any) -> Any:
        """A pointer to element `offset`."""
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.b.inttoptr(self.b.add(base, self.b.shl(offset, I64(2))), llvm.as_pointer())

    def load(self, base: Any, offset: Any, llvm: Any = VECTOR) -> Any:
        value = self.b.load(self.address(base, offset, llvm))
        value.align = 4
        return value

    def store(self, value: Any, base: Any, offset: Any) -> None:
        self.b.store(value, self.address(base, offset, value.type), align=4)

    def splat(self, value: Any, llvm: Any = VECTOR) -> Any:
        undefined = ir.Constant(llvm, ir.Undefined)
        return self.b.shuffle_vector(
            self.b.insert_element(undefined, value, I32(0)), undefined, ir.Constant(INTS, None)
        )

    def constant(self, value: float) -> Any:
        return ir.Constant(VECTOR, [ir.Constant(F32, value)] * LANES)

    def ints(self, value: int) -> Any:
        return ir.Constant(INTS, [ir.Constant(I32, value)] * LANES)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])

    def maximum(self, a: Any, b: Any) -> Any:
        """a where it is greater, else b: a NaN in a is passed over."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def exp2(self, x: Any) -> Any:
        """2^x for x <= 0: zero below the normal numbers, NaN for NaN."""
        low = self.b.fcmp_ordered("<", x, self.constant(-126.0))
        x = self.b.select(low, self.constant(-126.0), x)
        # by llvm.rint: numba's fastmath reaches in here, and would undo a rounding by adding and subtracting 2^23
        kind = ir.FunctionType(VECTOR, [VECTOR])
        whole = self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.rint.v{LANES}f32"), [x])
        rest = self.b.fsub(x, whole)
        value = self.constant(_EXP2[-1])
        for factor in reversed(_EXP2[:-1]):
            value = self.fma(value, rest, self.constant(factor))
        exponent = self.b.add(self.b.shl(self.b.fptosi(whole, INTS), self.ints(23)), self.ints(0x3F800000))
        return self.b.select(low, ZERO, self.b.fmul(value, self.b.bitcast(exponent, VECTOR)))

    def bf16_bits(self, x: Any) -> Any:
        """The bits of x, which is not infinite, rounded to bf16, in the upper half; a NaN stays one."""
        bits = self.b.bitcast(x, INTS)
        odd = self.b.and_(self.b.lshr(bits, self.ints(16)), self.ints(1))
        rounded = self.b.add(self.b.add(bits, self.ints(0x7FFF)), odd)
        number = self.b.fcmp_ordered("ord", x, x)
        return self.b.and_(self.b.select(number, rounded, self.ints(0x7FC00000)), self.ints(-65536))

    def loop(self, count: Any, starts: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Run body(step, values) count times, from `starts`; returns the last values."""
        entry = self.b.block
        inside, done = self.b.append_basic_block("loop"), self.b.append_basic_block("done")
        self.b.cbranch(self.b.icmp_signed(">", count, I64(0)), inside, done)
        self.b.position_at_end(inside)
        step = self.b.phi(I64)
        step.add_incoming(I64(0), entry)
        values = [self.b.phi(start.type) for start in starts]
        after = body(step, values)
        following = self.b.add(step, I64(1))
        step.add_incoming(following, inside)
        self.b.cbranch(self.b.icmp_signed("<", following, count), inside, done)
        self.b.position_at_end(done)
        results = []
        for phi, start, value in zip(values, starts, after, strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(value, inside)
            result = self.b.phi(start.type)
            result.add_incoming(start, entry)
            result.add_incoming(value, inside)
            results.append(result)
        return results


def _tile(pairs: bool) -> Any:
    element, vector = (I32, INTS) if pairs else (F32, VECTOR)
    dot = ir.InlineAsm(ir.FunctionType(VECTOR, [VECTOR, INTS, INTS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")

    @intrinsic
    def tile(_context: Any, c: Any, c_row: Any, a: Any, a_row: Any, a_k: Any, b: Any, b_row: Any, k: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            c, c_row, a, a_row, a_k, b, b_row, depth = args
            code = Code(builder)
            if pairs:
                binding.initialize_native_asmparser()

            def body(step: Any, sums: list[Any]) -> list[Any]:
                left, top = builder.mul(step, a_k), builder.mul(step, b_row)
                columns = [code.load(b, builder.add(top, I64(LANES * half)), vector) for half in range(2)]
                after = []
                for i in range(ROWS):
                    scalar = code.load(a, builder.add(builder.mul(a_row, I64(i)), left), element)
                    row = code.splat(scalar, vector)
                    for half in range(2):
                        total = sums[2 * i + half]
                        product = [total, row, columns[half]] if pairs else [row, columns[half], total]
                        after.append(builder.call(dot, product) if pairs else code.fma(*product))
                return after

            totals = code.loop(depth, [ZERO] * (2 * ROWS), body)
            for index, total in enumerate(totals):
                place = builder.add(builder.mul(c_row, I64(index // 2)), I64(LANES * (index % 2)))
                code.store(builder.fadd(code.load(c, place), total), c, place)
            return ir.Constant(I64, 0)

        return types.int64(*(types.int64,) * 8), codegen

    return tile


tile_f32 = _tile(pairs=False)
tile_bf16 = _tile(pairs=True)


@intrinsic
def column_max(_context: Any, x: Any, row: Any, keys: Any, factor: Any, m: Any, total: Any, shrink: Any) -> Any:
    """x *= factor; m = max(m, x over its rows); shrink = 2^(old m - new m), by which the sums `total` shrink.

    Args: address of x, its row stride, its rows, the factor (float32), addresses of m, total and shrink, 16 each.
    """

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        x, row, keys, factor, m, total, shrink = args
        code = Code(builder)
        scale = code.splat(factor)

        def body(step: Any, values: list[Any]) -> list[Any]:
            place = builder.mul(step, row)
            scaled = builder.fmul(code.load(x, place), scale)
            code.store(scaled, x, place)
            return [code.maximum(scaled, values[0])]

        before = code.load(m, 0)
        (highest,) = code.loop(keys, [before], body)
        code.store(highest, m, 0)
        factor = code.exp2(builder.fsub(before, _finite(code, highest)))
        code.store(factor, shrink, 0)
        code.store(builder.fmul(code.load(total, 0), factor), total, 0)
        return ir.Constant(I64, 0)

    return types.int64(x, row, keys, types.float32, m, total, shrink), codegen


def _finite(code: Code, m: Any) -> Any:
    """m, or zero where it is -inf: nothing was seen so far, and -inf minus it is to be -inf."""
    return code.b.select(code.b.fcmp_ordered("==", m, code.constant(float("-inf"))), ZERO, m)


def _column_exp(pairs: bool) -> Any:
    @intrinsic
    def column_exp(_context: Any, x: Any, row: Any, keys: Any, m: Any, total: Any, out: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            x, row, keys, m, total, out = args
            code = Code(builder)
            highest = _finite(code, code.load(m, 0))

            def one(step: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(step, row)
                value = code.exp2(builder.fsub(code.load(x, place), highest))
                code.store(value, out, place)
                return [builder.fadd(values[0], value)]

            def two(step: Any, values: list[Any]) -> list[Any]:
                place = builder.mul(builder.shl(step, I64(1)), row)
                low = code.exp2(builder.fsub(code.load(x, place), highest))
                high = code.exp2(builder.fsub(code.load(x, builder.add(place, row)), highest))
                lower = builder.lshr(code.bf16_bits(low), code.ints(16))
                code.store(builder.or_(lower, code.bf16_bits(high)), out, builder.mul(step, row))
                return [builder.fadd(values[0], builder.fadd(low, high))]

            steps = builder.ashr(keys, I64(1)) if pairs else keys
            (after,) = code.loop(steps, [code.load(total, 0)], two if pairs else one)
            code.store(after, total, 0)
            return ir.Constant(I64, 0)

        return types.int64(x, row, keys, m, total, out), codegen

    return column_exp


column_exp = _column_exp(pairs=False)
"""out = 2^(x - m), total += its sum over rows. Args: address of x, its row stride, its rows, addresses of m, total and
out, which may be x."""
column_exp_pairs = _column_exp(pairs=True)
"""The same with out as pairs of rows in bf16, the number of rows even; the sum is of the values before rounding."""
