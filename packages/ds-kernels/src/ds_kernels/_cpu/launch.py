"""Numba kernels on torch's own OpenMP threads: no second thread pool, the thread count is torch's.

A kernel is a C function of one argument, an array of 64-bit *slots*, compiled by numba without touching Python:

    @kernel
    def _double(a):                      # a: slots
        x = f32_array(a, HEAD, numel(a)) # see `intrinsics`
        ...
        low = take(a)                    # items are handed out in grains, so uneven threads do not wait for each other
        while low < total(a):
            for i in range(low, min(low + grain(a), total(a))):
                x[i] *= 2
            low = take(a)

`launch(_double, tensor, items=..., grain=...)` packs its arguments into the slots after the head (tensors as data
pointers, floats as their bits) and calls the function on torch's OpenMP threads through libgomp's entry point
`GOMP_parallel`, which is in the process since torch loaded it. Where it is not (macOS, Windows), one thread runs it.

Compiled at the first launch, cached on disk by numba beside the source (or under NUMBA_CACHE_DIR). Results never
depend on the number of threads: whoever takes an item computes it alone, and sums over items go through partial results
of fixed groups of items.

Two cautions for developers. A function that a kernel calls is compiled by itself and again within the kernel; the
process that compiles runs the first, one that loads the cache the second. Where the compiler may reorder its sums it
must be `forceinline=True`, or a program's first run differs from its second (tests/test_compile_cache.py). And
numba's cache looks at the kernel's own file only: after editing `intrinsics.py`, delete the *.nbc and *.nbi files.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FASTMATH",
    "HAS_NUMBA",
    "HEAD",
    "Kernel",
    "bind",
    "kernel",
    "launch",
    "run_team",
    "slots_of",
    "step",
    "word_of",
]

HAS_NUMBA: bool = importlib.util.find_spec("numba") is not None and os.environ.get("DS_KERNELS_NUMBA", "1") != "0"
"""Whether numba is installed and not switched off by DS_KERNELS_NUMBA=0."""

HEAD = 3
"""Slots in front of a kernel's own: the next item to hand out, the number of items, the grain."""

FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}
"""Liberties of the compiler: it may reorder sums and fuse multiply-adds; NaN and infinity mean what they mean."""


class Kernel:
    """A numba function of slots, or of some int64 numbers (`step`), compiled when its address is first asked for."""

    def __init__(self, function: Callable[..., None], numbers: int = 0) -> None:
        self._function, self._numbers = function, numbers
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @functools.cached_property
    def _compiled(self) -> Any:
        from numba import cfunc, types

        # numpy's error model: 1 / 0 is infinity. Python's would end the kernel half way, and nobody would hear of it.
        arguments = [types.int64] * self._numbers or [types.CPointer(types.int64)]
        signature = types.void(*arguments)
        fastmath = False if self._numbers else FASTMATH
        return cfunc(signature, cache=True, fastmath=fastmath, error_model="numpy")(self._function)

    @functools.cached_property
    def address(self) -> int:
        """Of the machine code."""
        return int(self._compiled.address)

    @functools.cached_property
    def call(self) -> Any:
        """The function for this thread alone, through ctypes (which releases the GIL)."""
        return self._compiled.ctypes


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Make a `Kernel` of a function of slots."""
    return Kernel(function)


def step(function: Callable[..., None]) -> Kernel:
    """Make a `Kernel` of a function of int64 numbers, which other kernels call by its address (`team.invoke`).

    That keeps it out of their machine code: numba compiles what a function calls again with every caller above it. Its
    sums are computed in the order that is written.
    """
    return Kernel(function, function.__code__.co_argcount)


@functools.cache
def _gomp_parallel() -> Any:
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def word_of(argument: Tensor | float) -> int:
    """What stands for a tensor or a float in a slot."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    word: int = struct.unpack("q", struct.pack("d", argument))[0] if isinstance(argument, float) else int(argument)
    return word


@functools.cache
def _slots(count: int) -> Any:
    return ctypes.c_int64 * count


def launch(function: Kernel, *args: Tensor | int | float, items: int, grain: int = 1) -> None:
    """Run a kernel over `items` work items, `grain` at a time, on up to `torch.get_num_threads()` threads.

    Tensors must be alive until it returns, contiguous as the kernel expects, and on the CPU: nothing is checked here.
    """
    _run(function, _pack(args, items, grain), -(-items // grain))


def bind(function: Kernel, *args: Tensor | int | float, items: int, grain: int = 1) -> Callable[[], None]:
    """`launch` prepared: a call runs the kernel on the same arguments, which it keeps alive. Not reentrant."""
    slots, grains = _pack(args, items, grain), -(-items // grain)

    def run(_alive: tuple[Any, ...] = args) -> None:
        slots[0] = 0
        _run(function, slots, grains)

    return run


def slots_of(count: int) -> Any:
    """Slots of a kernel that runs by `run_team`: a ctypes array, whose items from HEAD on are the kernel's own."""
    return _slots(count)()


def run_team(function: Kernel, slots: Any) -> None:
    """Run a kernel once on each of `torch.get_num_threads()` threads at the same time (see `team`)."""
    _run(function, slots, torch.get_num_threads())


def _pack(args: tuple[Tensor | int | float, ...], items: int, grain: int) -> Any:
    words = [argument if argument.__class__ is int else word_of(argument) for argument in args]
    return _slots(HEAD + len(words))(0, items, grain, *words)


def _run(function: Kernel, slots: Any, grains: int) -> None:
    threads = min(torch.get_num_threads(), grains)
    parallel = _gomp_parallel() if threads > 1 else None
    if parallel is None:
        function.call(slots)
    else:
        parallel(function.address, slots, threads, 0)
