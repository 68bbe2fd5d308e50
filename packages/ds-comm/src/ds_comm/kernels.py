"""Sums over ranks, in rank order, in one pass over memory (CPU).

``sum_rows`` is the arithmetic of every reduction of this package: ``out = round(scale * (((r0 + r1) + r2) + ...))``
with fp32 accumulation for 16-bit and fp32 rows, native accumulation for fp64 and integers. With numba (extra
``ds-comm[cpu]``) the rows are read once and nothing else is written; without it a cache-blocked torch loop gives the
same bits (which NaN a NaN result is, is not specified). ``DS_COMM_KERNELS=torch`` chooses the fallback.
numba is imported at the first sum, never at import of the package. Its compiler stays mapped when the kernels are
compiled: ``forget_compiler`` gives those pages back.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

_FLOAT16 = (torch.bfloat16, torch.float16)
_TORCH_BLOCK = 32768  # elements: two fp32 blocks and one row's block stay in a 512 KiB second-level cache


@functools.lru_cache(maxsize=1)
def _numba() -> ModuleType | None:
    """The compiled kernels, or None without numba or when ``DS_COMM_KERNELS`` is ``torch``."""
    if os.environ.get("DS_COMM_KERNELS", "auto") == "torch":
        return None
    try:
        return importlib.import_module("ds_comm._kernels_numba")
    except ImportError:
        return None


def backend() -> str:
    """``"numba"`` or ``"torch"``: what this process's sums run on."""
    return "torch" if _numba() is None else "numba"


def sum_rows(rows: Tensor, out: Tensor, *, accumulate: bool = False, scale: float = 1.0) -> None:
    """``out`` (+)= ``scale`` * the sum of ``rows`` in row order.

    rows: ``[num_rows, n]``, inner stride 1, any outer stride. out: contiguous ``[n]``, fp32 or the rows' dtype;
    ``accumulate`` needs fp32 ``out`` unless both are fp64 or integers. ``scale`` is rounded to fp32 for 16-bit and
    fp32 rows and multiplied in only when it is not 1. ``out`` must not overlap ``rows``, except that it may be the
    range of a row itself.
    """
    if out.numel() == 0:
        return
    narrow = rows.dtype in _FLOAT16 or rows.dtype == torch.float32
    compiled = _numba() if narrow and rows.device.type == "cpu" else None
    if compiled is not None:
        _sum_rows_numba(compiled, rows, out, accumulate, scale)
    else:
        _sum_rows_torch(rows, out, accumulate, scale if not narrow else _as_fp32(scale))


def _as_fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _sum_rows_numba(compiled: ModuleType, rows: Tensor, out: Tensor, accumulate: bool, scale: float) -> None:
    import numpy as np

    num_rows, width, stride = rows.shape[0], out.numel(), rows.stride(0)
    # one flat view over all rows: a one-dimensional contiguous array is what the compiler can vectorise
    flat = rows.as_strided(((num_rows - 1) * stride + width,), (1,))
    factor = np.float32(scale)
    if rows.dtype == torch.float32:
        compiled.sum32_to_fp32(flat.numpy(), num_rows, stride, out.numpy(), accumulate, factor)
        return
    bits = flat.view(torch.int16).numpy().view(np.uint16)
    is_bf16 = rows.dtype == torch.bfloat16
    if out.dtype == torch.float32:
        compiled.sum16_to_fp32(bits, is_bf16, num_rows, stride, out.numpy(), accumulate, factor)
    else:
        out_bits = out.view(torch.int16).numpy().view(np.uint16)
        compiled.sum16_to_16(bits, is_bf16, num_rows, stride, out_bits, factor)


def _sum_rows_torch(rows: Tensor, out: Tensor, accumulate: bool, scale: float) -> None:
    num_rows, width = rows.shape[0], out.numel()
    wide = torch.float32 if rows.dtype in _FLOAT16 else rows.dtype
    block = min(width, _TORCH_BLOCK) if rows.device.type == "cpu" else width  # an accelerator wants few large kernels
    acc = torch.empty(block, dtype=wide, device=rows.device)
    row_block = torch.empty(block, dtype=wide, device=rows.device) if rows.dtype != wide else None
    for start in range(0, width, block):
        stop = min(start + block, width)
        total = acc[: stop - start]
        total.copy_(rows[0, start:stop])
        for row in range(1, num_rows):
            piece = rows[row, start:stop]
            if row_block is not None:  # a mixed-dtype add is several times slower than widening first
                piece = row_block[: stop - start].copy_(piece)
            total.add_(piece)
        if scale != 1.0:
            total.mul_(scale)
        if accumulate:
            out[start:stop].add_(total)
        else:
            out[start:stop].copy_(total)


def forget_compiler() -> int:
    """Drop this process's pages of numba's compiler library (LLVM, 70 MB); returns the bytes they took.

    Only pages that are unchanged from their file go, so that they come back from it when something else is compiled.
    Call it when the kernels have run once. Without numba, or without Linux's ``/proc``, nothing happens.
    """
    dropped = 0
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            text = lines.read()
    except OSError:
        return dropped
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, stop, fields in _mappings(text, "libllvmlite"):
        if fields["Anonymous"] == 0 and libc.madvise(start, stop - start, mmap.MADV_DONTNEED) == 0:
            dropped += fields["Rss"]
    return dropped


def _mappings(smaps: str, name: str) -> Iterator[tuple[int, int, dict[str, int]]]:
    """First and last address and sizes in bytes of each read-only mapping of a file whose name begins with ``name``."""
    found: tuple[int, int] | None = None
    fields: dict[str, int] = {}
    for line in smaps.splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # a mapping begins: addresses, permissions, offset, device, inode, path
            if found is not None:
                yield *found, fields
            of_file = len(rest) == 5 and os.path.basename(rest[4]).startswith(name) and "w" not in rest[0]
            low, high = first.split("-")
            found, fields = (int(low, 16), int(high, 16)) if of_file else None, {}
        elif found is not None and rest[-1:] == ["kB"]:
            fields[first[:-1]] = int(rest[0]) * 1024
    if found is not None:
        yield *found, fields
