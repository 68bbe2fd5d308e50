"""Whole models out of a checkpoint: fp32 state dicts, safetensors folders, pytorch_model.bin; one tensor at a time.

A checkpoint knows global shapes and ranges, so a whole tensor is a read, not a conversion. Ties appear in a state dict
under all their names as one tensor, and in a safetensors folder under their first name only, as transformers does it.
Peak memory is one tensor, except where the result itself is a dict of tensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_zero.checkpoint import durable
from ds_zero.checkpoint.format import byte_view, dtype_from_name, plan_file
from ds_zero.checkpoint.read import Checkpoint, open_checkpoint
from ds_zero.checkpoint.shardfile import stream_file
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN

__all__ = ["LazyTensor", "export_safetensors", "export_torch", "full_state_dict", "parse_dtype", "parse_size"]

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """torch dtype of "fp32", "bf16", "fp16" and their long names; None stays None (as stored)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def parse_size(size: str | int | None) -> int | None:
    """Bytes of "5GB" (decimal), "500MiB" (binary) or a number; None means no limit."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise CheckpointError(f"max_shard_size {size!r} is not a size; expected for example '5GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on the disk; `contiguous()` reads it (checksums verified)."""

    checkpoint: Checkpoint = dataclasses.field(repr=False)
    name: str
    shape: torch.Size
    dtype: torch.dtype
    is_buffer: bool = False

    def contiguous(self) -> torch.Tensor:
        if not self.is_buffer:
            return self.checkpoint.read(self.name, dtype=self.dtype)
        full = f"buffer/{self.name}"
        return self.checkpoint.read_tensors(full)[full].to(self.dtype)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize


def _lazy_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype | None, exclude_frozen: bool, integer_buffers_too: bool
) -> dict[str, LazyTensor]:
    """Parameters under their first name, then buffers."""
    found: dict[str, LazyTensor] = {}
    for name, param in checkpoint.manifest.params.items():
        if not (exclude_frozen and param.group == FROZEN):
            stored = dtype_from_name(param.keys[checkpoint.value_key(name)].dtype)
            target = dtype if dtype is not None and stored.is_floating_point else stored
            found[name] = LazyTensor(checkpoint, name, torch.Size(param.shape), target)
    for full, tensor in checkpoint.manifest.tensors.items():
        if full.startswith("buffer/"):
            name = full.partition("/")[2]
            stored = dtype_from_name(tensor.dtype)
            converts = dtype is not None and (stored.is_floating_point or integer_buffers_too)
            target = dtype if converts and dtype is not None else stored
            found[name] = LazyTensor(checkpoint, name, torch.Size(tensor.shape), target, is_buffer=True)
    return found


def full_state_dict(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    dtype: str | torch.dtype | None = torch.float32,
    *,
    exclude_frozen: bool = False,
    lazy: bool = False,
    buffers_to_dtype: bool = False,
) -> dict[str, Any]:
    """The whole model: name -> tensor of global shape, parameters (ties under every name) and persistent buffers.

    Args:
        dtype: of floating-point tensors; None keeps what is stored (fp32 masters).
        exclude_frozen: leave out parameters that no optimizer group held.
        lazy: values are `LazyTensor`, read by `contiguous()`.
        buffers_to_dtype: convert integer buffers too, as upstream's zero_to_fp32 does.
    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
    """
    checkpoint = open_checkpoint(directory, tag)
    tensors = _lazy_tensors(checkpoint, parse_dtype(dtype), exclude_frozen, buffers_to_dtype)
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        state[name] = tensor if lazy else tensor.contiguous()
        param = checkpoint.manifest.params.get(name)
        if param is not None and not tensor.is_buffer:
            state.update((alias, state[name]) for alias in param.aliases)
    return state


def _split(tensors: Mapping[str, LazyTensor], limit: int | None) -> list[list[LazyTensor]]:
    """Fill files in order; a tensor larger than the limit gets a file of its own."""
    files: list[list[LazyTensor]] = [[]]
    used = 0
    for tensor in tensors.values():
        if limit is not None and files[-1] and used + tensor.nbytes > limit:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += tensor.nbytes
    return files


def _file_names(stem: str, suffix: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{index + 1:05d}-of-{count:05d}.{suffix}" for index in range(count)]


def _write_index(out: Path, name: str, names: Sequence[str], files: Sequence[Sequence[LazyTensor]]) -> Path:
    total = sum(tensor.nbytes for file in files for tensor in file)
    weight_map = {tensor.name: file for file, items in zip(names, files, strict=True) for tensor in items}
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    durable.write_durably(out / name, json.dumps(body, indent=2) + "\n")
    return out / name


def export_safetensors(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = torch.float32,
    max_shard_size: str | int | None = "5GB",
    tag: str | None = None,
    exclude_frozen: bool = False,
) -> list[Path]:
    """Write `model.safetensors` (or several files and an index) that `from_pretrained` loads; the files written.

    One tensor is in memory at a time. Ties are stored under their first name only.
    """
    checkpoint = open_checkpoint(directory, tag)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    files = _split(_lazy_tensors(checkpoint, parse_dtype(dtype), exclude_frozen, False), parse_size(max_shard_size))
    names = _file_names("model", "safetensors", len(files))
    written: list[Path] = []
    for name, items in zip(names, files, strict=True):
        _write_safetensors(target / name, items)
        written.append(target / name)
    if len(files) > 1:
        written.append(_write_index(target, "model.safetensors.index.json", names, files))
    return written


def _write_safetensors(path: Path, items: Sequence[LazyTensor]) -> None:
    ordered = sorted(items, key=lambda tensor: -tensor.dtype.itemsize)
    header, _ = plan_file([(t.name, t.dtype, tuple(t.shape)) for t in ordered], {"format": "pt"})

    def buffers() -> Iterator[memoryview]:
        yield memoryview(header)
        for tensor in ordered:
            yield byte_view(tensor.contiguous())

    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        stream_file(partial, buffers(), len(header) + sum(tensor.nbytes for tensor in ordered))
        durable.fsync_path(partial)
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def export_torch(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = torch.float32,
    max_shard_size: str | int | None = "5GB",
    tag: str | None = None,
    exclude_frozen: bool = False,
) -> list[Path]:
    """Write `pytorch_model.bin` (or several and an index), ties under every name, as upstream's zero_to_fp32 does."""
    checkpoint = open_checkpoint(directory, tag)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    tensors = _lazy_tensors(checkpoint, parse_dtype(dtype), exclude_frozen, True)
    files = _split(tensors, parse_size(max_shard_size))
    names = _file_names("pytorch_model", "bin", len(files))
    written: list[Path] = []
    for name, items in zip(names, files, strict=True):
        state: dict[str, torch.Tensor] = {}
        for tensor in items:
            state[tensor.name] = tensor.contiguous()
            param = checkpoint.manifest.params.get(tensor.name)
            if param is not None and not tensor.is_buffer:
                state.update((alias, state[tensor.name]) for alias in param.aliases)
        torch.save(state, target / name)
        written.append(target / name)
    if len(files) > 1:
        written.append(_write_index(target, "pytorch_model.bin.index.json", names, files))
    return written
