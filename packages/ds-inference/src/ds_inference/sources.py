"""Where weights come from: every form of checkpoint as tensors by name.

    a folder or a .safetensors file          as transformers writes them (`open_checkpoint`)
    a folder with pytorch_model*.bin         the same, older; unpickled with weights_only
    a description, JSON or dict              upstream's {"type", "checkpoints", "parallelization", "mp_size" ...}

A description lists files of whole tensors ("pp", or one rank), files of tensor-parallel ranks whose parts are joined
("tp"), or both ({"non_tp": [...], "tp": [...]}), as `save_shards` writes it. Parts are joined along the dimension that
the description names, else along the one that the model's shape tells.

Invariant: every file is there and can be read before the first tensor is taken; what is not is a CheckpointError that
names it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_inference.errors import CheckpointError
from ds_inference.loader import Checkpoint, open_checkpoint
from ds_inference.tp.applied import Part, part_of

__all__ = ["Parts", "TensorSource", "open_source"]

Parts = tuple[int, list[list[tuple[int, int]]]]
"""The dimension that is split, and each rank's ranges of it."""
_TYPES = ("ds_model", "megatron", "bloom")
_KEYS = ("type", "version", "checkpoints", "parallelization", "mp_size", "tp_size", "base_dir", "dtype", "parts")
_CONTIGUOUS = ("c_attn", "qkv_proj", "gate_up_proj", "Wqkv")
"""Fused layers whose parts cannot be joined by putting ranks one after the other."""


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """All there are."""

    def __contains__(self, name: str) -> bool: ...

    def read(
        self, name: str, shape: Sequence[int], part: Part, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> Tensor:
        """A part of a tensor (None: all of it) in memory of its own; `shape` is the whole one's in the model."""


class _Safetensors:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names = checkpoint.names

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def read(
        self, name: str, shape: Sequence[int], part: Part, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> Tensor:
        dim, ranges = (None, ()) if part is None else part
        return self.checkpoint.read(name, dim, ranges, dtype=dtype, device=device)


class _TorchFiles:
    """State dicts that torch.save wrote, mapped; of one file after the other, the first that has a name counts."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, value in _state_of(file).items():
                self._tensors.setdefault(name, value)
        self.names = tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(
        self, name: str, shape: Sequence[int], part: Part, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> Tensor:
        return part_of(self._tensors[name], part).to(device=device, dtype=dtype, copy=part is None)


class _Chained:
    """Several sources; a name is the first's that has it."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._homes: dict[str, TensorSource] = {}
        for source in sources:
            for name in source.names:
                self._homes.setdefault(name, source)
        self.names = tuple(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def read(
        self, name: str, shape: Sequence[int], part: Part, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> Tensor:
        return self._homes[name].read(name, shape, part, dtype=dtype, device=device)


class _Joined:
    """The parts of tensor-parallel ranks."""

    def __init__(self, ranks: Sequence[TensorSource], parts: Mapping[str, Parts]) -> None:
        self._ranks, self._parts = ranks, parts
        self.names = ranks[0].names
        for number, rank in enumerate(ranks):
            if odd := sorted(set(rank.names) ^ set(self.names)):
                raise CheckpointError(
                    f"the checkpoint's rank {number} and rank 0 do not have the same tensors ({odd[0]} is in one); "
                    "list one file per rank, of one checkpoint"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(
        self, name: str, shape: Sequence[int], part: Part, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> Tensor:
        return part_of(self._whole(name, shape, dtype, device), part)

    def _whole(self, name: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
        pieces = [rank.read(name, shape, None, dtype=dtype, device=device) for rank in self._ranks]
        if name in self._parts:
            dim, ranges = self._parts[name]
            size = max(high for one in ranges for _, high in one)
            whole = pieces[0].new_empty([*pieces[0].shape[:dim], size, *pieces[0].shape[dim + 1 :]])
            for piece, one in zip(pieces, ranges, strict=True):
                at = 0
                for low, high in one:
                    whole.narrow(dim, low, high - low).copy_(piece.narrow(dim, at, high - low))
                    at += high - low
            return whole
        if list(pieces[0].shape) == list(shape):
            if any(not torch.equal(piece, pieces[0]) for piece in pieces):
                raise CheckpointError(f"{name} is whole on every rank of the checkpoint, and not the same on all")
            return pieces[0]
        return torch.cat(pieces, self._dim(name, pieces, shape))

    def _dim(self, name: str, pieces: Sequence[Tensor], shape: Sequence[int]) -> int:
        sizes = [list(piece.shape) for piece in pieces]
        for dim in range(len(shape)):
            joined = [*sizes[0][:dim], sum(size[dim] for size in sizes), *sizes[0][dim + 1 :]]
            if joined == list(shape):
                if any(part in name for part in _CONTIGUOUS):
                    raise CheckpointError(
                        f"{name} is fused and split over the checkpoint's ranks, in an order that shapes do not tell; "
                        "join the checkpoint with the tool that wrote it, and give the whole one"
                    )
                return dim
        raise CheckpointError(
            f"{name} has {', '.join(map(str, sizes))} on the checkpoint's ranks, which do not join to the model's "
            f"{list(shape)}; it is a checkpoint of another model"
        )


def open_source(source: str | Path | Mapping[str, Any], base_dir: str = "") -> TensorSource:
    """Open a checkpoint of any form; CheckpointError for what is missing, broken or not understood."""
    if isinstance(source, Mapping):
        return _described(source, Path(base_dir or source.get("base_dir") or "."), "the checkpoint description")
    path = Path(base_dir) / source if base_dir else Path(source)
    if path.suffix == ".json" and path.is_file():
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint description {path} cannot be read: {error}") from error
        if not isinstance(description, dict):
            raise CheckpointError(f"checkpoint description {path} is a {type(description).__name__}; expected keys")
        return _described(description, Path(base_dir or description.get("base_dir") or path.parent), str(path))
    if path.is_dir() and not any(path.glob("*.safetensors")) and (files := sorted(path.glob("pytorch_model*.bin"))):
        return _TorchFiles(files)
    return _opened(path)


def _described(description: Mapping[str, Any], base: Path, what: str) -> TensorSource:
    if unknown := sorted(set(description) - set(_KEYS)):
        raise CheckpointError(f"{what} has the unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    kind = str(description.get("type", "ds_model"))
    if kind.lower() not in _TYPES:
        raise CheckpointError(f"{what} has the type {kind!r}; expected ds_model, Megatron or BLOOM")
    listed = description.get("checkpoints")
    by_rank = str(description.get("parallelization", "pp")) == "tp"
    parts = {name: (int(dim), [[(a, b) for a, b in one] for one in ranges])
             for name, (dim, ranges) in dict(description.get("parts") or {}).items()}  # fmt: skip
    if isinstance(listed, Mapping):
        sources: list[TensorSource] = [_opened(base / one) for one in listed.get("non_tp", ())]
        if ranks := [_opened(base / one) for one in listed.get("tp", ())]:
            sources.append(_Joined(ranks, parts))
        return _Chained(sources)
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise CheckpointError(f"{what} has no list of files under 'checkpoints'; expected one, or 'tp' and 'non_tp'")
    opened = [_opened(base / one) for one in listed]
    size = int(description.get("mp_size", description.get("tp_size", 0)) or 0)
    if (by_rank or kind.lower() == "megatron") and len(opened) > 1:
        if size not in (0, len(opened)):
            raise CheckpointError(f"{what} has mp_size {size} and {len(opened)} files; expected one file per rank")
        return _Joined(opened, parts)
    return _Chained(opened)


def _opened(path: Path) -> TensorSource:
    if path.is_dir() or path.suffix == ".safetensors" or not path.exists():
        return _Safetensors(open_checkpoint(path))
    return _TorchFiles([path])


def _state_of(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"checkpoint file {file} is cut short, or holds more than tensors ({reason}); fetch or copy it again, or "
            "save its state dict alone"
        ) from error
    for key in ("module", "model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)} if loaded else {}
    if not tensors:
        raise CheckpointError(f"checkpoint file {file} has no tensors; expected a state dict")
    return tensors
