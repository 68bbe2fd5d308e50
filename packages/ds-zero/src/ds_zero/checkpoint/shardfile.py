"""Writing one rank's shard file straight from live memory: plan, header, `pwritev`, checksums. No copy of the state.

Vocabulary
    run    consecutive tensors of the file that are also consecutive in memory; written as one buffer. Gaps between
           parameters are not written.

A tensor of a segment is named `<key>/<parameter>/<start>-<stop>`; whole tensors are `buffer/<name>`, `extra/...` and
`rank_extra/...`. Checksums are computed chunk by chunk just before the chunk is written: at 50 GB/s from cache xxh3
hides behind the copy, and no byte is read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ds_zero.checkpoint.diskio import write_chunks
from ds_zero.checkpoint.format import Entry, byte_view, plan_file
from ds_zero.checkpoint.manifest import FileRecord, KeyRecord, ParamRecord, Span, TensorRecord
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN, Piece
from ds_zero.state import StateSegment

__all__ = ["ShardPlan", "plan_shard", "stream_file", "write_shard"]

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


def stream_file(path: Path, buffers: Iterable[memoryview], total_nbytes: int) -> FileRecord:
    """Write a new file from a stream of buffers; its size and the checksum of each chunk. Not yet fsynced."""
    nbytes, checksums = write_chunks(path, buffers, total_nbytes)
    return FileRecord(path.name, nbytes, checksums)


def write_shard(plan: ShardPlan, path: Path) -> FileRecord:
    """Put the shard into the file: page cache or disk, fsync is still to come.

    Raises:
        CheckpointError: the disk is full or cannot be written; names the file and the bytes needed.
    """

    def buffers() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        for tensor in plan.runs:
            yield from _memory_of(tensor)

    try:
        return stream_file(path, buffers(), plan.nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: writing {plan.nbytes} bytes failed: {error.strerror or error}") from error
