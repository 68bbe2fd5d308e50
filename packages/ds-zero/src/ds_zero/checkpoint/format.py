"""The bytes of one shard file: the safetensors layout, written from plans and read back. Pure, no torch.distributed.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes without gaps. We pad the header so that data begins at a multiple of 64 and order tensors by descending
item size, so every tensor is aligned to its item and no element straddles a chunk.

Vocabulary
    chunk   `CHUNK_NBYTES` consecutive bytes of the file (the last one may be shorter); the unit of checksums.
    entry   one named tensor in the header; `offset` counts from the beginning of the file, header included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ds_zero.errors import CheckpointError

__all__ = ["CHUNK_NBYTES", "Entry", "byte_view", "dtype_from_name", "dtype_name", "plan_file", "read_header"]

CHUNK_NBYTES = 4 << 20
_ALIGN = 64
_MAX_HEADER_NBYTES = 512 << 20

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; CheckpointError if the format has none."""
    if dtype not in _NAMES:
        raise CheckpointError(
            f"dtype {dtype} cannot be stored in safetensors; expected one of {sorted(map(str, _NAMES))}"
        )
    return _NAMES[dtype]


def dtype_from_name(name: str) -> torch.dtype:
    """Inverse of `dtype_name`."""
    if name not in _DTYPES:
        raise CheckpointError(f"safetensors dtype {name!r} is unknown; expected one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy (writable)."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file. `offset` is absolute (bytes from the beginning of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_from_name(self.dtype).itemsize


def plan_file(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[Entry]]:
    """Header bytes and absolute offsets of tensors stored back to back in the given order.

    Args:
        tensors: (name, dtype, shape); item sizes must not increase, so that every tensor is aligned.
        metadata: str -> str, stored as `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    relative = 0
    begins: list[int] = []
    for name, dtype, shape in tensors:
        if name in header:
            raise CheckpointError(f"tensor {name!r} would be written twice; names must be unique in a file")
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [relative, relative + nbytes]}
        begins.append(relative)
        relative += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    data_start = 8 + len(text)
    entries = [
        Entry(name, dtype_name(dtype), shape, data_start + begin)
        for (name, dtype, shape), begin in zip(tensors, begins, strict=True)
    ]
    return len(text).to_bytes(8, "little") + text, entries


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, metadata and total size that the header of a safetensors file promises.

    Raises:
        CheckpointError: no such file, or its header is not one (cut short, not JSON, offsets out of order).
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= _MAX_HEADER_NBYTES:
                raise CheckpointError(f"{path}: header length {size} is not plausible; the file is damaged")
            raw = file.read(size)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    if len(raw) < size:
        raise CheckpointError(f"{path}: the header is {size} bytes but the file ends after {len(raw)}; it is cut short")
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {
            name: Entry(name, item["dtype"], tuple(item["shape"]), 8 + size + item["data_offsets"][0])
            for name, item in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is unreadable ({error}); the file is damaged") from error
    return entries, metadata, _end(8 + size, entries.values())


def _end(data_start: int, entries: Iterable[Entry]) -> int:
    return max((entry.offset + entry.nbytes for entry in entries), default=data_start)
