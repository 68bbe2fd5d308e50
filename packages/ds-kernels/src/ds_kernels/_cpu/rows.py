"""Few query rows against many keys that stream by once: what decoding is made of, beside `tiles`.

Keys and values are rows at addresses from a table: pages of any size will do. Dims are multiples of 16. As in `tiles`,
these are vectors emitted as LLVM, with addresses as int64 and nothing checked.

    dots[code, R]       scores: the products of R query rows (fp32) with KEYS key rows of a dtype, summed along dim
    dots_bf16_pairs     [R] the same by AVX512_BF16 (HAS_BF16_DOT), the query in bf16; dims are multiples of 32
    gather[code, R, V]  o[i, :] += sum over j of p[i, j] * value row j, for R rows i and 16 * V dims
    prefetch            the cache line of an address

Pages lie anywhere, so the hardware cannot know what comes next: while it works on a row, this code asks for the same
part of the row AHEAD addresses on, one line at a time (bursts would stall), into the second-level cache (what is on its
way to the first one occupies its few miss buffers). Tables of addresses have AHEAD entries more than rows.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def,type-arg"

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ds_kernels._cpu.tiles import LANES, Code

__all__ = ["AHEAD", "KEYS", "dots", "dots_bf16_pairs", "gather", "prefetch"]

AHEAD = 16
"""Rows between one that is worked on and one that is prefetched meanwhile."""
KEYS = 4
"""Key rows that a call of `dots` takes: with up to four query rows, 16 sums in registers."""

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


def _addresses(code: Code, table: Any, first: int) -> list[Any]:
    """KEYS addresses from the entry `first` of the table at an address on."""
    places = [code.b.add(table, _I64(8 * (first + j))) for j in range(KEYS)]
    return [code.b.load(code.b.inttoptr(place, _I64.as_pointer())) for place in places]


def _sums(code: Code, vectors: list[Any]) -> Any:
    """Lane j is the sum of vector j: neighbours are folded until one vector is left."""
    vectors, width = vectors + [_ZERO] * (-len(vectors) % 4), LANES
    even, odd = (ir.Constant(_INTS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
    while width > 1:
        left, right = vectors[::2], vectors[1::2] or vectors
        right = right + [_ZERO] * (len(left) - len(right))
        vectors = [
            code.b.fadd(code.b.shuffle_vector(a, b, even), code.b.shuffle_vector(a, b, odd))
            for a, b in zip(left, right, strict=True)
        ]
        width //= 2
    return vectors[0]


def _prefetch(builder: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), _I32(0), _I32(2), _I32(1)])


def _dots(dtype: int, pairs: bool, num: int) -> Any:
    product = ir.InlineAsm(ir.FunctionType(_VECTOR, [_VECTOR, _INTS, _INTS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")
    size = 4 if dtype == F32 else 2

    @intrinsic
    def dots(_context: Any, out: Any, out_row: Any, query: Any, query_row: Any, keys: Any, skip: Any, dim: Any) -> Any:
        """Addresses of the scores and of the query rows, each with the bytes between rows, and of KEYS key addresses;
        bytes that are added to those; the dim."""

        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            out, out_row, query, query_row, keys, skip, dim = args
            code = Code(builder)
            if pairs:
                binding.initialize_native_asmparser()
            rows, following = ([builder.add(row, skip) for row in _addresses(code, keys, at)] for at in (0, AHEAD))
            queries = [builder.add(query, builder.mul(query_row, _I64(i))) for i in range(num)]
            chunk = LANES * (2 if pairs else 1)

            def body(step: Any, values: list[Any]) -> list[Any]:
                offset = builder.mul(step, _I64(size * chunk))
                lefts = [code.load(row, builder.mul(step, _I64(LANES)), _INTS if pairs else _VECTOR) for row in queries]
                after = list(values)
                for j, (row, later) in enumerate(zip(rows, following, strict=True)):
                    place = builder.add(row, offset)
                    _prefetch(builder, builder.add(later, offset))
                    if pairs:
                        right = builder.load(builder.inttoptr(place, _INTS.as_pointer()))
                        right.align = 2
                    else:
                        right = _widened(code, place, dtype)
                    for i, left in enumerate(lefts):
                        at = i * KEYS + j
                        operands = [values[at], left, right] if pairs else [left, right, values[at]]
                        after[at] = builder.call(product, operands) if pairs else code.fma(*operands)
                return after

            totals = code.loop(builder.udiv(dim, _I64(chunk)), [_ZERO] * (num * KEYS), body)
            sums = _sums(code, totals)
            for i in range(num):
                part = ir.Constant(ir.VectorType(_I32, KEYS), [i * KEYS + j for j in range(KEYS)])
                found = builder.shuffle_vector(sums, sums, part)
                place = builder.add(out, builder.mul(out_row, _I64(i)))
                builder.store(found, builder.inttoptr(place, found.type.as_pointer()), align=4)
            return ir.Constant(_I64, 0)

        return types.int64(*(types.int64,) * 7), codegen

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
                after_it = builder.inttoptr(builder.add(builder.ptrtoint(place, _I64), _I64(8 * AHEAD)), place.type)
                following = builder.add(builder.load(after_it), skip)
                for line in range(0, size * LANES * width, 64):
                    _prefetch(builder, builder.add(following, _I64(line)))
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
        _prefetch(builder, args[0])
        return ir.Constant(_I64, 0)

    return types.int64(types.int64), codegen


_HEIGHTS = (1, 2, 3, 4)
dots: dict[tuple[int, int], Any] = {
    (dtype, height): _dots(dtype, False, height) for dtype in (F32, BF16, FP16) for height in _HEIGHTS
}
dots_bf16_pairs: dict[int, Any] = {height: _dots(BF16, True, height) for height in _HEIGHTS}
gather: dict[tuple[int, int, int], Any] = {
    (dtype, height, width): _gather(dtype, height, width)
    for dtype in (F32, BF16, FP16)
    for height in _HEIGHTS
    for width in (1, 4)
}
