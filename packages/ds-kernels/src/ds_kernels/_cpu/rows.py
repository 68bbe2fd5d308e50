"""Few query rows against many keys that stream by once: what decoding is made of, beside `tiles`.

Keys and values are rows at 16 addresses each, so pages of any size will do; dims are multiples of 16. As in `tiles`,
these are vectors emitted as LLVM, with addresses as int64 and nothing checked.

    dots[code]          16 scores: the products of one query row (fp32) with 16 key rows of a dtype, summed along dim
    dots_bf16_pairs     the same by AVX512_BF16 (HAS_BF16_DOT), the query in bf16; dims are multiples of 32
    gather[code, R, V]  o[i, :] += sum over j of p[i, j] * value row j, for R rows i and 16 * V dims
    prefetch            the cache line of an address: pages lie anywhere, and the hardware cannot know what comes next
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def,type-arg"

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ds_kernels._cpu.tiles import LANES, Code

__all__ = ["dots", "dots_bf16_pairs", "gather", "prefetch"]

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_ZERO = ir.Constant(_VECTOR, None)
F32, BF16, FP16 = 0, 1, 2
"""Codes as in `dtypes`."""


def _widened(code: Code, address: Any, dtype: int) -> Any:
    """16 elements of a dtype at an address, as fp32."""
    kind = {F32: _VECTOR, BF16: ir.VectorType(_I16, LANES), FP16: ir.VectorType(ir.HalfType(), LANES)}[dtype]
    value = code.b.load(code.b.inttoptr(address, kind.as_pointer()))
    value.align = 2 if dtype else 4
    if dtype == BF16:
        return code.b.bitcast(code.b.shl(code.b.zext(value, _INTS), code.ints(16)), _VECTOR)
    return code.b.fpext(value, _VECTOR) if dtype == FP16 else value


def _addresses(code: Code, table: Any) -> list[Any]:
    """The 16 addresses that lie at an address."""
    return [code.b.load(code.b.inttoptr(code.b.add(table, _I64(8 * j)), _I64.as_pointer())) for j in range(LANES)]


def _sums(code: Code, vectors: list[Any]) -> Any:
    """Lane j is the sum of vector j: pairs of vectors are folded until one is left."""
    while len(vectors) > 1:
        even = ir.Constant(_INTS, [2 * i for i in range(LANES)])
        odd = ir.Constant(_INTS, [2 * i + 1 for i in range(LANES)])
        vectors = [
            code.b.fadd(code.b.shuffle_vector(a, b, even), code.b.shuffle_vector(a, b, odd))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _dots(dtype: int, pairs: bool) -> Any:
    product = ir.InlineAsm(ir.FunctionType(_VECTOR, [_VECTOR, _INTS, _INTS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")
    size = 4 if dtype == F32 else 2

    @intrinsic
    def dots(_context: Any, out: Any, query: Any, keys: Any, skip: Any, dim: Any) -> Any:
        """Addresses of 16 scores, of the query row and of 16 key addresses; bytes that are added to those; the dim."""

        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            out, query, keys, skip, dim = args
            code = Code(builder)
            if pairs:
                binding.initialize_native_asmparser()
            rows = [builder.add(row, skip) for row in _addresses(code, keys)]
            chunk = LANES * (2 if pairs else 1)

            def body(step: Any, values: list[Any]) -> list[Any]:
                first = builder.mul(step, _I64(chunk))
                left = code.load(query, builder.mul(step, _I64(LANES)), _INTS if pairs else _VECTOR)
                after = []
                for row, value in zip(rows, values, strict=True):
                    place = builder.add(row, builder.mul(first, _I64(size)))
                    if pairs:
                        right = builder.load(builder.inttoptr(place, _INTS.as_pointer()))
                        right.align = 2
                        after.append(builder.call(product, [value, left, right]))
                    else:
                        after.append(code.fma(left, _widened(code, place, dtype), value))
                return after

            totals = code.loop(builder.udiv(dim, _I64(chunk)), [_ZERO] * LANES, body)
            code.store(_sums(code, totals), out, 0)
            return ir.Constant(_I64, 0)

        return types.int64(*(types.int64,) * 5), codegen

    return dots


def _gather(dtype: int, height: int, width: int) -> Any:
    size = 4 if dtype == F32 else 2

    @intrinsic
    def gather(
        _context: Any, o: Any, o_row: Any, p: Any, p_row: Any, values: Any, skip: Any, count: Any, first: Any
    ) -> Any:
        """Addresses of o and p with their row strides, of the value addresses; bytes added to those, their number, the
        first dim."""

        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            o, o_row, p, p_row, values, skip, count, first = args
            code = Code(builder)
            skip = builder.add(skip, builder.mul(first, _I64(size)))

            def body(step: Any, sums: list[Any]) -> list[Any]:
                place = builder.inttoptr(builder.add(values, builder.shl(step, _I64(3))), _I64.as_pointer())
                row = builder.add(builder.load(place), skip)
                right = [_widened(code, builder.add(row, _I64(size * LANES * v)), dtype) for v in range(width)]
                after = []
                for i in range(height):
                    weight = code.load(p, builder.add(builder.mul(p_row, _I64(i)), step), _F32)
                    left = code.splat(weight)
                    after += [code.fma(left, right[v], sums[i * width + v]) for v in range(width)]
                return after

            starts = [
                (builder.add(builder.mul(o_row, _I64(i)), builder.add(first, _I64(LANES * v))))
                for i in range(height)
                for v in range(width)
            ]
            totals = code.loop(count, [code.load(o, start) for start in starts], body)
            for start, value in zip(starts, totals, strict=True):
                code.store(value, o, start)
            return ir.Constant(_I64, 0)

        return types.int64(*(types.int64,) * 8), codegen

    return gather


@intrinsic
def prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line of an address."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], pointer), _I32(0), _I32(3), _I32(1)])
        return ir.Constant(_I64, 0)

    return types.int64(types.int64), codegen


dots: dict[int, Any] = {dtype: _dots(dtype, False) for dtype in (F32, BF16, FP16)}
dots_bf16_pairs = _dots(BF16, True)
gather: dict[tuple[int, int, int], Any] = {
    (dtype, height, width): _gather(dtype, height, width)
    for dtype in (F32, BF16, FP16)
    for height in (1, 2, 3, 4)
    for width in (1, 4)
}
