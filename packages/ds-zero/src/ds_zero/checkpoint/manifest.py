"""The manifest: what a checkpoint holds and where each element lies. Pure data and pure functions, no ranks, no I/O.

Vocabulary
    span     elements `[start, stop)` of a flattened parameter, stored at byte `offset` of one file.
    key      "master", "param" or an optimizer state ("exp_avg"); see ds_zero.state.
    record   what one rank wrote (`RankRecord`); rank 0 merges all records into the manifest.

Invariants
    the spans of each (parameter, key) tile [0, numel) exactly: `merge` refuses anything else;
    the manifest's last member is the xxh3_64 of the rest of its text: a changed digit is as good as a torn file;
    a checkpoint knows nothing of units, stages or world sizes that a reader would need: loading is the intersection of
    ranges (`intersect`), so any layout reads any other.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from ds_zero.errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileRecord",
    "KeyRecord",
    "Manifest",
    "ParamRecord",
    "RankRecord",
    "Span",
    "TensorRecord",
    "intersect",
    "merge",
    "record_from_json",
    "record_to_json",
    "shard_file_name",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_FORMAT_NAME = "ds-zero-checkpoint"
_SEAL = ',"xxh3_64":"'


def shard_file_name(rank: int, world_size: int) -> str:
    return f"shard_{rank:05d}-of-{world_size:05d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Span:
    """Elements `[start, stop)` of a flattened parameter at byte `offset` of file number `file`."""

    file: int
    start: int
    stop: int
    offset: int


@dataclasses.dataclass
class KeyRecord:
    """One state of one parameter: its stored dtype (safetensors name) and its spans by `start`."""

    dtype: str
    spans: list[Span]


@dataclasses.dataclass
class ParamRecord:
    """One parameter. `dtype` is the model's (torch name without "torch."); `group` -1 means frozen."""

    shape: tuple[int, ...]
    dtype: str
    group: int
    aliases: tuple[str, ...]
    keys: dict[str, KeyRecord]
    scalars: dict[str, float]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A whole tensor that belongs to no parameter (buffer, RNG state, tensor of the client state)."""

    file: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One shard file: its size, and the xxh3_64 of each 4 MiB chunk as 16 hex digits."""

    name: str
    nbytes: int
    chunks: tuple[str, ...]


@dataclasses.dataclass
class RankRecord:
    """What one rank wrote. `extra` is rank 0's JSON tree (None elsewhere), `rank_extra` the rank's own."""

    rank: int
    file: FileRecord
    params: dict[str, ParamRecord]
    tensors: dict[str, TensorRecord]
    extra: Any
    rank_extra: Any


@dataclasses.dataclass
class Manifest:
    """A whole checkpoint. `files[i]` was written by rank i; `rank_extra[i]` is that rank's own JSON tree."""

    tag: str
    nonce: str
    ds_version: str
    world_size: int
    num_shards: int
    state_shards: int
    exclude_frozen: bool
    files: list[FileRecord]
    params: dict[str, ParamRecord]
    tensors: dict[str, TensorRecord]
    extra: Any
    rank_extra: list[Any]
    version: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def names(self) -> dict[str, str]:
        """Every name of every parameter (ties included) -> the name it is stored under."""
        found = {name: name for name in self.params}
        for name, param in self.params.items():
            found.update((alias, name) for alias in param.aliases)
        return found

    def to_json(self) -> str:
        body = {
            "format": _FORMAT_NAME,
            "version": self.version,
            "tag": self.tag,
            "nonce": self.nonce,
            "ds_version": self.ds_version,
            "total_nbytes": self.nbytes,
            "layout": {
                "world_size": self.world_size,
                "num_shards": self.num_shards,
                "state_shards": self.state_shards,
                "exclude_frozen": self.exclude_frozen,
            },
            "extra": self.extra,
            "rank_extra": self.rank_extra,
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "params": {name: _param_to_json(param) for name, param in self.params.items()},
            "files": [_file_to_json(file) for file in self.files],
        }
        return _sealed(json.dumps(body, separators=(",", ":")))

    @staticmethod
    def from_json(text: str, source: str) -> Manifest:
        """Parse a manifest; `source` (its path) is named in errors."""
        try:
            body = json.loads(text)
            if body["format"] != _FORMAT_NAME:
                raise CheckpointError(f"{source}: format is {body['format']!r}, expected {_FORMAT_NAME!r}")
            if body["version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{source}: format version {body['version']} is newer than {FORMAT_VERSION}, "
                    "the newest this ds-zero reads; upgrade ds-zero"
                )
            _check_seal(text, source)
            layout = body["layout"]
            return Manifest(
                tag=body["tag"],
                nonce=body["nonce"],
                ds_version=body["ds_version"],
                world_size=layout["world_size"],
                num_shards=layout["num_shards"],
                state_shards=layout["state_shards"],
                exclude_frozen=layout["exclude_frozen"],
                files=[_file_from_json(item) for item in body["files"]],
                params={name: _param_from_json(item) for name, item in body["params"].items()},
                tensors={name: _tensor_from_json(item) for name, item in body["tensors"].items()},
                extra=body["extra"],
                rank_extra=body["rank_extra"],
                version=body["version"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{source} is not a readable manifest ({type(error).__name__}: {error}); it is damaged"
            ) from error


def _sealed(text: str) -> str:
    """A JSON object's text with its own checksum as the last member."""
    return f'{text[:-1]}{_SEAL}{xxhash.xxh3_64_hexdigest(text.encode())}"}}'


def _check_seal(text: str, source: str) -> None:
    body, _, _ = text.rpartition(_SEAL)
    if text != _sealed(body + "}"):
        raise CheckpointError(
            f"{source}: the manifest does not have the checksum it was written with; it was changed or damaged"
        )


def record_to_json(record: RankRecord) -> str:
    return json.dumps(
        {
            "rank": record.rank,
            "file": _file_to_json(record.file),
            "params": {name: _param_to_json(param) for name, param in record.params.items()},
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in record.tensors.items()},
            "extra": record.extra,
            "rank_extra": record.rank_extra,
        },
        separators=(",", ":"),
    )


def record_from_json(text: str) -> RankRecord:
    body = json.loads(text)
    return RankRecord(
        rank=body["rank"],
        file=_file_from_json(body["file"]),
        params={name: _param_from_json(item) for name, item in body["params"].items()},
        tensors={name: _tensor_from_json(item) for name, item in body["tensors"].items()},
        extra=body["extra"],
        rank_extra=body["rank_extra"],
    )


def _file_to_json(file: FileRecord) -> dict[str, Any]:
    return {"name": file.name, "nbytes": file.nbytes, "xxh3_64": "".join(file.chunks)}


def _file_from_json(item: dict[str, Any]) -> FileRecord:
    digits = item["xxh3_64"]
    return FileRecord(item["name"], item["nbytes"], tuple(digits[i : i + 16] for i in range(0, len(digits), 16)))


def _tensor_to_json(tensor: TensorRecord) -> list[Any]:
    return [tensor.file, tensor.offset, tensor.dtype, list(tensor.shape)]


def _tensor_from_json(item: list[Any]) -> TensorRecord:
    return TensorRecord(item[0], item[1], item[2], tuple(item[3]))


def _param_to_json(param: ParamRecord) -> dict[str, Any]:
    return {
        "shape": list(param.shape),
        "dtype": param.dtype,
        "group": param.group,
        "aliases": list(param.aliases),
        "scalars": param.scalars,
        "keys": {
            key: {"dtype": record.dtype, "spans": [[s.file, s.start, s.stop, s.offset] for s in record.spans]}
            for key, record in param.keys.items()
        },
    }


def _param_from_json(item: dict[str, Any]) -> ParamRecord:
    keys = {
        key: KeyRecord(record["dtype"], [Span(*span) for span in record["spans"]])
        for key, record in item["keys"].items()
    }
    return ParamRecord(
        tuple(item["shape"]), item["dtype"], item["group"], tuple(item["aliases"]), keys, item["scalars"]
    )


def merge(records: Sequence[RankRecord]) -> tuple[dict[str, ParamRecord], dict[str, TensorRecord]]:
    """Join what all ranks wrote, and check that every element of every (parameter, key) was written exactly once.

    Raises:
        CheckpointError: shapes or dtypes differ between ranks, or elements are missing or doubled; names the parameter.
    """
    params: dict[str, ParamRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    for record in records:
        tensors.update(record.tensors)
        for name, part in record.params.items():
            whole = params.get(name)
            if whole is None:
                params[name] = dataclasses.replace(part, keys={}, scalars=dict(part.scalars))
                whole = params[name]
            elif (whole.shape, whole.dtype) != (part.shape, part.dtype):
                raise CheckpointError(
                    f"parameter {name!r} is {part.dtype}{list(part.shape)} on rank {record.rank} but "
                    f"{whole.dtype}{list(whole.shape)} on a lower rank; the ranks built different models"
                )
            for key, piece in part.keys.items():
                whole.keys.setdefault(key, KeyRecord(piece.dtype, [])).spans.extend(piece.spans)
    for name, param in params.items():
        for key, found in param.keys.items():
            found.spans.sort(key=lambda span: span.start)
            _check_tiling(name, key, param.numel, found.spans)
    return params, tensors


def _check_tiling(name: str, key: str, numel: int, spans: Sequence[Span]) -> None:
    position = 0
    for span in spans:
        if span.start != position or span.stop <= span.start:
            what = "missing" if span.start > position else "written twice"
            low, high = sorted((position, span.start))
            raise CheckpointError(
                f"{key} of parameter {name!r}: elements {low}..{high} of {numel} are {what}; "
                "every element must be exported by exactly one rank"
            )
        position = span.stop
    if position != numel:
        raise CheckpointError(
            f"{key} of parameter {name!r}: elements {position}..{numel} of {numel} are missing; "
            "every element must be exported by exactly one rank"
        )


def intersect(spans: Sequence[Span], start: int, stop: int, itemsize: int) -> Iterator[Span]:
    """The stored spans (or parts of them) that hold elements `[start, stop)`, in order; `spans` sorted by start."""
    low, high = 0, len(spans)
    while low < high:  # first span that ends after `start`
        middle = (low + high) // 2
        if spans[middle].stop <= start:
            low = middle + 1
        else:
            high = middle
    for span in spans[low:]:
        if span.start >= stop:
            return
        first, last = max(start, span.start), min(stop, span.stop)
        if first < last:
            yield Span(span.file, first, last, span.offset + (first - span.start) * itemsize)
