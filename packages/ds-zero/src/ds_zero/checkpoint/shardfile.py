"""Writing one rank's shard file straight from live memory: plan, header, `pwritev`, checksums. No copy of the state.

Vocabulary
    run    consecutive tensors of the file that are also consecutive in memory; written as one buffer. Gaps between
           parameters are not written.

A tensor of a segment is named `<key>/<parameter>/<start>-<stop>`; whole tensors are `buffer/<name>`, `extra/...` and
`rank_extra/...`. Checksums are computed chunk by chunk just before the chunk is written: at 50 GB/s from cache xxh3
hides behind the copy into the page cache, and no byte is read twice.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from ds_zero.checkpoint.format import CHUNK_NBYTES, Entry, byte_view, plan_file
from ds_zero.checkpoint.manifest import FileRecord, KeyRecord, ParamRecord, Span, TensorRecord
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN, Piece
from ds_zero.state import StateSegment

__all__ = ["ShardPlan", "plan_shard", "stream_file", "write_shard"]

_MAX_IOV = 512
_STAGING_NBYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class _Run:
    tensor: torch.Tensor
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    pieces: tuple[Piece, ...]
    key: str


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """Everything about a shard file except its checksums."""

    rank: int
    header: bytes
    runs: tuple[torch.Tensor, ...]
    params: dict[str, ParamRecord]
    tensors: dict[str, TensorRecord]
    nbytes: int


def _segment_runs(segment: StateSegment) -> Iterator[_Run]:
    """Per key, one run for each stretch of pieces without a gap between them (the layout aligns slots)."""
    stretches: list[list[Piece]] = []
    for piece in segment.unit.pieces(segment.start, segment.stop):
        if stretches and stretches[-1][-1].offset + stretches[-1][-1].numel == piece.offset:
            stretches[-1].append(piece)
        else:
            stretches.append([piece])
    for key, tensor in segment.tensors.items():
        if tensor.ndim != 1 or tensor.numel() != segment.numel:
            raise CheckpointError(
                f"{key} of unit {segment.unit.name!r} has shape {list(tensor.shape)}; expected [{segment.numel}]"
            )
        for pieces in stretches:
            names = tuple((f"{key}/{p.slot.name}/{p.start}-{p.stop}", tensor.dtype, (p.numel,)) for p in pieces)
            memory = tensor.detach()[pieces[0].offset : pieces[-1].offset + pieces[-1].numel]
            yield _Run(memory, names, tuple(pieces), key)


def plan_shard(
    rank: int,
    segments: Sequence[StateSegment],
    extras: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    exclude_frozen: bool = False,
) -> ShardPlan:
    """Lay out the file of one rank: where each piece of `segments` and each whole tensor of `extras` goes."""
    kept = [segment for segment in segments if not (exclude_frozen and segment.group == FROZEN)]
    runs = [(run, segment) for segment in kept for run in _segment_runs(segment)]
    whole = [
        _Run(tensor.detach().reshape(-1), ((name, tensor.dtype, tuple(tensor.shape)),), (), "")
        for name, tensor in extras.items()
    ]
    ordered: list[tuple[_Run, StateSegment | None]] = [*runs, *((run, None) for run in whole)]
    ordered.sort(key=lambda item: -item[0].tensor.itemsize)  # stable; keeps every tensor aligned to its item size
    header, entries = plan_file([tensor for run, _ in ordered for tensor in run.tensors], metadata)
    params: dict[str, ParamRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    position = iter(entries)
    for run, segment in ordered:
        if segment is None:
            entry = next(position)
            tensors[entry.name] = TensorRecord(rank, entry.offset, entry.dtype, entry.shape)
            continue
        for piece in run.pieces:
            _record_piece(params, rank, run.key, piece, next(position), segment)
    nbytes = len(header) + sum(run.tensor.nbytes for run, _ in ordered)
    return ShardPlan(rank, header, tuple(run.tensor for run, _ in ordered), params, tensors, nbytes)


def _record_piece(
    params: dict[str, ParamRecord], rank: int, key: str, piece: Piece, entry: Entry, segment: StateSegment
) -> None:
    slot = piece.slot
    if slot.name not in params:
        scalars = {name: float(value) for name, value in segment.scalars.items()}
        params[slot.name] = ParamRecord(slot.shape, segment.unit.dtype, slot.group, slot.aliases, {}, scalars)
    record = params[slot.name].keys.setdefault(key, KeyRecord(entry.dtype, []))
    record.spans.append(Span(rank, piece.start, piece.stop, entry.offset))


def _memory_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes: its own memory on CPU, else staged through host memory 32 MiB at a time."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield byte_view(tensor)
        return
    step = max(1, _STAGING_NBYTES // tensor.itemsize)
    for start in range(0, tensor.numel(), step):
        yield byte_view(tensor[start : start + step].cpu().contiguous())


def _chunks(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Regroup a stream of buffers into lists of exactly CHUNK_NBYTES (the last may be shorter)."""
    chunk: list[memoryview] = []
    room = CHUNK_NBYTES
    for buffer in buffers:
        position = 0
        while position < len(buffer):
            part = buffer[position : position + room]
            chunk.append(part)
            position += len(part)
            room -= len(part)
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK_NBYTES
    if chunk:
        yield chunk


def _write_all(fd: int, parts: list[memoryview], offset: int) -> None:
    """Write `parts` one after another at `offset`, whatever the kernel takes at a time."""
    while parts:
        written = os.pwritev(fd, parts[:_MAX_IOV], offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        while parts and written >= len(parts[0]):
            written -= len(parts[0])
            parts.pop(0)
        if written:
            parts[0] = parts[0][written:]


def stream_file(path: Path, buffers: Iterable[memoryview]) -> FileRecord:
    """Write a new file from a stream of buffers; its size and the checksum of each chunk. Not yet fsynced."""
    checksums: list[str] = []
    offset = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for parts in _chunks(buffers):
            digest = xxhash.xxh3_64()
            for part in parts:
                digest.update(part)
            nbytes = sum(map(len, parts))
            _write_all(fd, parts, offset)
            checksums.append(digest.hexdigest())
            offset += nbytes
    finally:
        os.close(fd)
    return FileRecord(path.name, offset, tuple(checksums))


def write_shard(plan: ShardPlan, path: Path) -> FileRecord:
    """Put the shard into the page cache.

    Raises:
        CheckpointError: the disk is full or cannot be written; names the file and the bytes needed.
    """

    def buffers() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        for tensor in plan.runs:
            yield from _memory_of(tensor)

    try:
        return stream_file(path, buffers())
    except OSError as error:
        raise CheckpointError(f"{path}: writing {plan.nbytes} bytes failed: {error.strerror or error}") from error
