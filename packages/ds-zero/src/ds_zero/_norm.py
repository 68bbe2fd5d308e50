"""The global gradient norm: each element once, by the shard map.

Squares are summed in fp64 and the root is rounded to fp32 once. The fp64 sum depends on the layout by about 1e-16 of
its value, the fp32 result only if the sum falls that close to a rounding boundary: about once in 1e8 norms.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ds_comm import Communicator, ReduceOp
from ds_zero._unit import Unit

__all__ = ["first_nonfinite", "global_norm", "sum_of_squares"]

CHUNK_NUMEL = 1 << 16
"""Elements converted to fp64 at a time; half a MiB stays in the cache."""

NO_CULPRIT = 1 << 62

MAX_NAME_NBYTES = 512
"""Of a parameter's name that travels between the parts of a model."""


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


def global_norm(
    units: Sequence[Unit],
    comm: Communicator,
    *,
    sharded: bool,
    parts: Communicator | None = None,
    duplicates: Collection[str] = (),
) -> float:
    """L2 norm over all units' mean gradients; the same float on every rank (inf or NaN if any element is).

    Args:
        parts: over the other parts of the model, whose units count as well.
        duplicates: names of parameters that another part counts.
    """
    if not units and parts is None:
        return 0.0
    squares = [sum_of_squares(part) for unit in units for part in _counted(unit, duplicates)]
    device = units[0].device if units else torch.device("cpu")
    total = torch.stack(squares).sum().reshape(1) if squares else torch.zeros(1, dtype=torch.float64, device=device)
    if sharded:
        comm.all_reduce(total, label="gradient norm")
    if parts is not None:
        parts.all_reduce(total, label="gradient norm of all parts")
    return float(total.sqrt().float())


def _counted(unit: Unit, duplicates: Collection[str]) -> Iterator[Tensor]:
    """The gradients of the own range, 1-D, without those of duplicates."""
    if not any(slot.name in duplicates for slot in unit.layout.slots):
        for _, part in unit.grad_parts(0, unit.stop - unit.start):
            yield part
        return
    for piece in unit.layout.pieces(unit.start, unit.stop):
        if piece.slot.name not in duplicates:
            yield unit.grad_of(piece)


def first_nonfinite(units: Sequence[Unit], comm: Communicator, parts: Communicator | None = None) -> str:
    """Name of the first parameter (by part, then unit) whose gradient holds inf or NaN on any rank; collective."""
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
    flag = torch.tensor([found], dtype=torch.int64, device=units[0].device if units else torch.device("cpu"))
    comm.all_reduce(flag, ReduceOp.MIN, label="first non-finite gradient")
    name = names[int(flag)] if int(flag) != NO_CULPRIT else ""
    if parts is not None:
        name = _first_name(name, parts, flag.device)
    return name or "the global norm (it overflowed fp32)"


def _first_name(name: str, parts: Communicator, device: torch.device) -> str:
    """The first part's name that is not empty; collective."""
    flag = torch.tensor([parts.rank if name else NO_CULPRIT], dtype=torch.int64, device=device)
    parts.all_reduce(flag, ReduceOp.MIN, label="first part with a non-finite gradient")
    if int(flag) == NO_CULPRIT:
        return ""
    text = torch.zeros(MAX_NAME_NBYTES, dtype=torch.uint8, device=device)
    encoded = name.encode()[:MAX_NAME_NBYTES]
    text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device=device)
    parts.broadcast(text, int(flag), label="name of the first non-finite gradient")
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
