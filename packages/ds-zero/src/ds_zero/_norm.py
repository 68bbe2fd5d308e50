"""The global gradient norm: each element once, by the shard map.

Squares are summed in fp64 and the root is rounded to fp32 once. The fp64 sum depends on the layout by about 1e-16 of
its value, the fp32 result only if the sum falls that close to a rounding boundary: about once in 1e8 norms.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ds_comm import Communicator, ReduceOp
from ds_zero._unit import Unit

__all__ = ["first_nonfinite", "global_norm", "sum_of_squares"]

CHUNK_NUMEL = 1 << 16
"""Elements converted to fp64 at a time; half a MiB stays in the cache."""

NO_CULPRIT = 1 << 62


@functools.cache
def _compiled() -> ModuleType | None:
    """The numba kernels, None without numba (extra `ds-zero[cpu]`)."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("ds_zero._norm_numba")


def sum_of_squares(values: Tensor) -> Tensor:
    """fp64 sum of squares of a 1-D contiguous tensor, as a 0-d tensor on its device."""
    if values.device.type != "cpu":
        root: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
        return root.square()
    compiled = _compiled()
    if compiled is not None and values.dtype == torch.float32:
        return torch.tensor(compiled.sum_of_squares_fp32(values.numpy()), dtype=torch.float64)
    if compiled is not None and values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).numpy().view("uint16")
        return torch.tensor(compiled.sum_of_squares_bf16(bits), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    scratch = torch.empty(min(CHUNK_NUMEL, values.numel()), dtype=torch.float64)
    for part in values.split(CHUNK_NUMEL):
        wide = scratch[: part.numel()].copy_(part)
        total += torch.dot(wide, wide)
    return total


def global_norm(units: Sequence[Unit], comm: Communicator, *, sharded: bool) -> float:
    """L2 norm over all units' mean gradients; the same float on every rank (inf or NaN if any element is)."""
    if not units:
        return 0.0
    squares = [sum_of_squares(part) for unit in units for _, part in unit.grad_parts(0, unit.stop - unit.start)]
    total = torch.stack(squares).sum().reshape(1)
    if sharded:
        comm.all_reduce(total, label="gradient norm")
    return float(total.sqrt().float())


def first_nonfinite(units: Sequence[Unit], comm: Communicator) -> str:
    """Name of the first parameter (in unit order) whose gradient holds inf or NaN on any rank; collective."""
    found = NO_CULPRIT
    names: list[str] = []
    for unit in sorted(units, key=lambda u: u.layout.index):
        base = len(names)
        names += [slot.name for slot in unit.layout.slots]
        if unit.grad is None or found != NO_CULPRIT or math.isfinite(float(sum_of_squares(unit.grad))):
            continue
        for piece in unit.layout.pieces(unit.start, unit.stop):
            if not bool(torch.isfinite(unit.grad[piece.offset : piece.offset + piece.numel]).all()):
                found = base + unit.layout.slots.index(piece.slot)
                break
    flag = torch.tensor([found], dtype=torch.int64, device=units[0].device)
    comm.all_reduce(flag, ReduceOp.MIN, label="first non-finite gradient")
    return names[int(flag)] if int(flag) != NO_CULPRIT else "the global norm (it overflowed fp32)"
