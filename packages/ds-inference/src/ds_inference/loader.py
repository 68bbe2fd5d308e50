"""Checkpoints on disk: folders of safetensors files, read tensor by tensor, or only a rank's ranges of each.

A checkpoint is a folder as transformers writes it: `model.safetensors`, or **shards** (files with some of the tensors
each) listed by `model.safetensors.index.json`; or shards without an index; or one file. `read` copies the ranges asked
for into a tensor of just that size, so a rank never holds more than its own part: whole tensors and ranges of rows are
read from the file straight into it, ranges of other dimensions through a mapping of the file.

Invariants: what is missing is noticed when the checkpoint is opened, before any tensor is read: every file that is
listed or numbered is there, whole (safetensors' header says how long a file is), and has the tensors listed for it; no
tensor is in two files. Each of these is a CheckpointError that names the file. Bytes that were changed in place are not
noticed: the format has no checksum.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_inference.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
Part = tuple[int, Sequence[tuple[int, int]]] | None
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_SHOWN = 5


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open a folder (or one safetensors file) and check that it is complete. CheckpointError when it is not."""
    where = Path(path)
    if where.is_file() and where.suffix == ".safetensors":
        return Checkpoint(where, {where: None})
    if not where.is_dir():
        raise CheckpointError(f"checkpoint {where} is not there; expected a folder with safetensors files, or one file")
    if (where / INDEX).is_file():
        return Checkpoint(where, _listed(where / INDEX))
    files = sorted(where.glob("*.safetensors"))
    if not files:
        others = sorted(one.name for one in where.iterdir())[:_SHOWN]
        raise CheckpointError(
            f"checkpoint {where} has no safetensors file (it has {', '.join(others) or 'nothing'}); save the model "
            "with save_pretrained(..., safe_serialization=True)"
        )
    if (where / "model.safetensors") in files:
        return Checkpoint(where, {where / "model.safetensors": None})
    _check_numbers(where, files)
    return Checkpoint(where, dict.fromkeys(files))


class Checkpoint:
    """Tensors by name, in one file or several. Close it, or use it in a `with` statement."""

    def __init__(self, path: Path, expected: Mapping[Path, Sequence[str] | None]) -> None:
        """`expected`: files, each with the names that it must have, or None for whatever it has."""
        self.path = path
        self._files: dict[Path, Any] = {}
        self._homes: dict[str, Path] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        for file, wanted in expected.items():
            opened = _open(file, wanted)
            self._files[file] = opened
            held = list(opened.keys())
            if wanted is not None and (missing := sorted(set(wanted) - set(held))):
                raise CheckpointError(
                    f"checkpoint shard {file} lacks {_some(missing)}, which {INDEX} says it has; "
                    "the files are of different checkpoints: fetch them again"
                )
            for name in held if wanted is None else wanted:
                if name in self._homes:
                    raise CheckpointError(
                        f"tensor {name} is in {self._homes[name]} and in {file}; keep the files of one checkpoint only"
                    )
                self._homes[name] = file

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors that were read stay."""
        self._files.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the files."""
        return tuple(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def file(self, name: str) -> Path:
        """Where a tensor is. CheckpointError for a name that there is not."""
        if name not in self._homes:
            close = sorted(one for one in self._homes if one.endswith("." + name) or name.endswith("." + one))
            hint = f"; it has {_some(close)}" if close else ""
            raise CheckpointError(f"checkpoint {self.path} has no tensor {name} among its {len(self._homes)}{hint}")
        return self._homes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(
        self,
        name: str,
        dim: int | None = None,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A tensor, or its `ranges` (start, stop) of dimension `dim`, one after the other, in memory of its own.

        `dtype`: cast to it on the way; the file's own by default. ValueError for ranges outside of the tensor.
        """
        source = self._slice(name)
        shape = list(source.get_shape())
        if dim is not None:
            if not 0 <= dim < len(shape):
                raise ValueError(f"{name} has shape {tuple(shape)}; dimension {dim} is not one of it")
            for low, high in ranges:
                if not 0 <= low < high <= shape[dim]:
                    raise ValueError(f"{name} has {shape[dim]} in dimension {dim}; range ({low}, {high}) is not in it")
            if not ranges:
                raise ValueError(f"no ranges of {name} are asked for; expected at least one, or dim=None for all")
        mapped = self._files[self.file(name)].get_tensor(name)  # of which nothing is read yet
        if not shape or mapped.numel() == 0:
            small: Tensor = mapped.to(device=device, dtype=dtype, copy=True)
            return small
        if dim in (None, 0):
            return self._read_rows(name, mapped, ranges if dim == 0 else [(0, shape[0])], dtype, device)
        shape[dim] = sum(high - low for low, high in ranges)
        result = torch.empty(shape, dtype=dtype or mapped.dtype, device=device)
        at = 0
        for low, high in ranges:
            key = (*(slice(None),) * dim, slice(low, high))
            result.narrow(dim, at, high - low).copy_(source[key])
            at += high - low
        return result

    def _read_rows(
        self,
        name: str,
        mapped: Tensor,
        ranges: Sequence[tuple[int, int]],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Tensor:
        """Rows of a tensor by plain reads: pages of a mapping would count as this process's memory beside the copy."""
        shape = (sum(high - low for low, high in ranges), *mapped.shape[1:])
        result = torch.empty(shape, dtype=mapped.dtype)
        row = mapped.nbytes // mapped.shape[0]
        file = self.file(name)
        first = self._offset(file, name)
        at = result.data_ptr()
        with file.open("rb", buffering=0) as opened:
            for low, high in ranges:
                opened.seek(first + low * row)
                target = memoryview((ctypes.c_char * ((high - low) * row)).from_address(at)).cast("B")
                at += len(target)
                while len(target):
                    got = opened.readinto(target)
                    if not got:
                        raise CheckpointError(f"checkpoint shard {file} ends within {name}; fetch or copy it again")
                    target = target[got:]
        return result.to(device=device, dtype=dtype)

    def _offset(self, file: Path, name: str) -> int:
        """Where a tensor's bytes begin in its file: the header is its length, 8 bytes, and as much JSON."""
        if file not in self._offsets:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            self._offsets[file] = {
                key: 8 + size + value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"
            }
        return self._offsets[file][name]

    def read_parts(
        self,
        parts: Mapping[str, Part],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all `parts`, as `TensorParallelPlan.tensors(rank)` has them, file after file.

        A name that there is not is a CheckpointError before the first tensor is read.
        """
        if missing := [name for name in parts if name not in self._homes]:
            raise CheckpointError(f"checkpoint {self.path} lacks {_some(missing)}; it is not one of this model")
        return self._read_parts(parts, dtype, device)

    def _read_parts(
        self, parts: Mapping[str, Part], dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Iterator[tuple[str, Tensor]]:
        for name in self._homes:
            if name in parts:
                part = parts[name]
                dim, ranges = (None, ()) if part is None else part
                yield name, self.read(name, dim, ranges, dtype=dtype, device=device)

    def _slice(self, name: str) -> Any:
        file = self.file(name)
        if file not in self._files:
            raise ValueError(f"checkpoint {self.path} is closed; read {name} before")
        return self._files[file].get_slice(name)


def _open(file: Path, wanted: Sequence[str] | None) -> Any:
    about = "" if wanted is None else f", which should hold {_some(wanted)},"
    if not file.is_file():
        raise CheckpointError(f"checkpoint shard {file}{about} is missing; fetch or copy it again")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint shard {file}{about} is cut short or no safetensors file ({error}; {file.stat().st_size} bytes"
            "); fetch or copy it again"
        ) from error


def _listed(index: Path) -> dict[Path, Sequence[str] | None]:
    """Files and their tensors by the index."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, file in found.items():
            if Path(file).name != file:
                raise CheckpointError(f"checkpoint index {index} places {name} in {file!r}; expected a file beside it")
            shards.setdefault(index.parent / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"checkpoint index {index} cannot be read ({type(error).__name__}: {error}); expected JSON with a "
            "weight_map of tensor names to files"
        ) from error
    return dict(sorted(shards.items()))


def _check_numbers(folder: Path, files: Sequence[Path]) -> None:
    """Of shards that are numbered, 1 of 3 and so on, all must be there: without an index nothing else says so."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if numbered := _NUMBERED.fullmatch(file.name):
            sets.setdefault((numbered[1], int(numbered[3])), set()).add(int(numbered[2]))
    for (stem, total), numbers in sets.items():
        if missing := sorted(set(range(1, total + 1)) - numbers):
            raise CheckpointError(
                f"checkpoint {folder} has {len(numbers)} of {total} shards {stem}-*; missing are "
                f"{_some([str(number) for number in missing])}: fetch or copy them again"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
