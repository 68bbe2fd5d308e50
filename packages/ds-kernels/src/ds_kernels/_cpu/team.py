"""Numba kernels in which several threads work through stages together: who one is, a barrier, and shares of the work.

A kernel of `launch` knows no other thread; one that runs a whole model in a single launch has to. Here a thread asks
OpenMP how many it is (`team`), and `barrier` lets nobody on before all have come. Threads spin, because a stage lasts
microseconds; after SPINS rounds they give their processor away, so that a peer that was preempted gets it.

Shares: every thread takes the items of its own share one after the other, then those that are left of the others' (so
a thread that was held up costs one item, not its share). Three sets of counters take turns by stage: while one is in
use, each thread clears its own counter of the next one, which nobody has touched since the barrier before the last.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-any-return,no-untyped-def"

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["LINE", "SETS", "addresses", "barrier", "clear_next", "invoke", "member", "share", "take_from", "team"]

LINE = 64
"""Bytes between counters: one cache line each."""
SETS = 3
"""Sets of counters."""
SPINS = 2000
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def addresses() -> tuple[int, int, int]:
    """Of omp_get_num_threads, omp_get_thread_num and sched_yield; 0 where the process has none."""
    found = []
    for name in ("omp_get_num_threads", "omp_get_thread_num", "sched_yield"):
        try:
            found.append(ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0)
        except (AttributeError, OSError, TypeError):
            found.append(0)
    return found[0], found[1], found[2]


@intrinsic
def _call(_context: Any, address: Any) -> Any:
    """The C function `int f(void)` at an address."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def invoke(_context: Any, address: Any, numbers: Any) -> Any:
    """The function of a `step` at an address, with a tuple of its numbers."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], i) for i in range(len(numbers))]
        kind = ir.FunctionType(ir.VoidType(), [_I64] * len(values))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return _I64(0)

    return types.int64(address, types.UniTuple(types.int64, len(numbers))), codegen


@intrinsic
def _add(_context: Any, address: Any, amount: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read(_context: Any, address: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _clear(_context: Any, address: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        builder.store_atomic(_I64(0), builder.inttoptr(args[0], _I64.as_pointer()), "release", 8)
        return _I64(0)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(_context: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, _args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])
        return _I64(0)

    return types.int64(), codegen


@njit(inline="always")
def team(count_at):
    """How many threads run this kernel; count_at: address of omp_get_num_threads, or 0."""
    return _call(count_at) if count_at else 1


@njit(inline="always")
def member(index_at, size):
    """Which of them this one is."""
    return _call(index_at) if size > 1 else 0


@njit(inline="never")
def barrier(meeting, size, turn, yield_at):
    """Wait until all `size` threads have come for the turn-th time (counted from 1); meeting: address of a counter."""
    if size == 1:
        return
    _add(meeting, 1)
    spins = 0
    while _read(meeting) < size * turn:
        spins += 1
        if spins < SPINS or not yield_at:
            _pause()
        else:
            _call(yield_at)


@njit(inline="always")
def take_from(hands, size, stage, owner):
    """The next item of the share of a thread, counted from 0."""
    return _add(hands + LINE * (stage % SETS * size + owner), 1)


@njit(inline="always")
def clear_next(hands, size, stage, index):
    """At the start of a stage, by every thread."""
    _clear(hands + LINE * ((stage + 1) % SETS * size + index))


@njit(inline="always")
def share(items, size, owner):
    """The items `[first, last)` of a thread's share."""
    return items * owner // size, items * (owner + 1) // size
