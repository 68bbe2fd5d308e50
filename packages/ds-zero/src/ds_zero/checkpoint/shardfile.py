"""Writing one rank's shard file straight from live memory: plan, header, `pwritev`, checksums. No copy of the state.

Vocabulary
    run      consecutive tensors of the file that are also consecutive in memory; written as one buffer. Gaps between
             parameters are not written.
    private  a run in CPU memory that nothing but the optimizer's update writes. A chunk of only private runs may be
             written later, while training goes on, as long as the next update waits for it; all others are written
             before `save` returns.

A tensor of a segment is named `<key>/<parameter>/<start>-<stop>`; whole tensors are `buffer/<name>`, `extra/...` and
`rank_extra/...`. Checksums are computed chunk by chunk just before the chunk is written: at 50 GB/s from cache xxh3
hides behind the copy, and no byte is read twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ds_zero.checkpoint.diskio import ChunkWriter, write_chunks
from ds_zero.checkpoint.format import CHUNK_NBYTES, Entry, byte_view, plan_file
from ds_zero.checkpoint.manifest import FileRecord, KeyRecord, ParamRecord, Span, TensorRecord
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN, Piece
from ds_zero.state import StateSegment

__all__ = ["ShardPlan", "ShardWriter", "plan_shard", "stream_file"]


@dataclasses.dataclass(frozen=True)
class _Run:
    tensor: torch.Tensor
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    pieces: tuple[Piece, ...]
    key: str
    private: bool


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """Everything about a shard file except its checksums."""

    rank: int
    header: bytes
    runs: tuple[torch.Tensor, ...]
    private: tuple[bool, ...]
    params: dict[str, ParamRecord]
    tensors: dict[str, TensorRecord]
    nbytes: int


def _segment_runs(segment: StateSegment, skip: Collection[str]) -> Iterator[_Run]:
    """Per key, one run for each stretch of pieces without a gap between them (the layout aligns slots)."""
    stretches: list[list[Piece]] = []
    for piece in segment.unit.pieces(segment.start, segment.stop):
        if piece.slot.name in skip:
            continue
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
            private = key in segment.private and tensor.device.type == "cpu" and memory.is_contiguous()
            yield _Run(memory.contiguous(), names, tuple(pieces), key, private)


def plan_shard(
    rank: int,
    segments: Sequence[StateSegment],
    extras: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    exclude_frozen: bool = False,
    skip: Collection[str] = (),
) -> ShardPlan:
    """Lay out the file of one rank: where each piece of `segments` and each whole tensor of `extras` goes.

    `skip` names parameters that another rank writes.
    """
    kept = [segment for segment in segments if not (exclude_frozen and segment.group == FROZEN)]
    runs = [(run, segment) for segment in kept for run in _segment_runs(segment, skip)]
    whole = [
        _Run(tensor.detach().reshape(-1), ((name, tensor.dtype, tuple(tensor.shape)),), (), "", False)
        for name, tensor in extras.items()
    ]
    ordered: list[tuple[_Run, StateSegment | None]] = [*runs, *((run, None) for run in whole)]
    ordered.sort(key=lambda item: (-item[0].tensor.itemsize, item[0].private))  # stable; aligns tensors to their items
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
    memory, private = tuple(run.tensor for run, _ in ordered), tuple(run.private for run, _ in ordered)
    return ShardPlan(rank, header, memory, private, params, tensors, nbytes)


def _record_piece(
    params: dict[str, ParamRecord], rank: int, key: str, piece: Piece, entry: Entry, segment: StateSegment
) -> None:
    slot = piece.slot
    if slot.name not in params:
        scalars = {name: float(value) for name, value in segment.scalars.items()}
        params[slot.name] = ParamRecord(slot.shape, segment.unit.dtype, slot.group, slot.aliases, {}, scalars)
    record = params[slot.name].keys.setdefault(key, KeyRecord(entry.dtype, []))
    record.spans.append(Span(rank, piece.start, piece.stop, entry.offset))


def stream_file(path: Path, buffers: Iterable[memoryview], total_nbytes: int) -> FileRecord:
    """Write a new file from a stream of buffers; its size and the checksum of each chunk. Not yet fsynced."""
    nbytes, checksums = write_chunks(path, buffers, total_nbytes)
    return FileRecord(path.name, nbytes, checksums)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Bytes `[start, stop)` of a run (-1: of the header)."""

    run: int
    start: int
    stop: int


def _cut(plan: ShardPlan) -> Iterator[list[_Part]]:
    """The parts of each chunk of the file."""
    chunk: list[_Part] = []
    room = CHUNK_NBYTES
    for run, nbytes in [(-1, len(plan.header)), *((i, tensor.nbytes) for i, tensor in enumerate(plan.runs))]:
        position = 0
        while position < nbytes:
            part = _Part(run, position, min(position + room, nbytes))
            chunk.append(part)
            room -= part.stop - part.start
            position = part.stop
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK_NBYTES
    if chunk:
        yield chunk


class ShardWriter:
    """Writes a plan's file in two halves: what others may change soon, and what waits for the next update.

    Errors are CheckpointErrors that name the file and the bytes needed.
    """

    def __init__(self, plan: ShardPlan, path: Path, *, defer: bool) -> None:
        self._plan: ShardPlan | None = plan
        self._path = path
        self._nbytes = plan.nbytes
        self._writer: ChunkWriter | None = None
        now: list[tuple[int, list[_Part]]] = []
        self._later: list[tuple[int, list[_Part]]] = []
        for index, parts in enumerate(_cut(plan)):
            private = all(part.run >= 0 and plan.private[part.run] for part in parts)
            (self._later if defer and private else now).append((index, parts))
        self._now = now

    def write_now(self) -> None:
        """Put into the file (cache or disk, fsync is still to come) whatever may change while training goes on."""
        with self._named_errors():
            self._writer = ChunkWriter(self._path)
            self._writer.feed(self._views(self._now))
            self._writer.write_now(len(self._now) * CHUNK_NBYTES)
            self._writer.feed(self._views(self._later))

    def write_rest(self) -> FileRecord:
        """Write the rest with little processor time, in the background; then let go of the state."""
        assert self._writer is not None
        try:
            with self._named_errors():
                self._writer.write_cheaply()
            return FileRecord(self._path.name, self._nbytes, self._writer.checksums)
        finally:
            self.close()

    def finish_reading(self) -> None:
        """Return when nothing of the state will be read any more; helps to get there."""
        writer = self._writer
        if writer is not None:
            writer.hurry()

    def close(self) -> None:
        """Give up what is not written; the file stays as it is."""
        writer, self._writer, self._plan = self._writer, None, None
        if writer is not None:
            writer.close()

    def _views(self, chunks: Sequence[tuple[int, list[_Part]]]) -> Iterator[tuple[int, list[memoryview]]]:
        return ((index, [self._view(part) for part in parts]) for index, parts in chunks)

    def _view(self, part: _Part) -> memoryview:
        """Its bytes: the tensor's own memory on CPU, else copied to the host."""
        assert self._plan is not None
        if part.run < 0:
            return memoryview(self._plan.header)[part.start : part.stop]
        tensor = self._plan.runs[part.run]
        if tensor.device.type == "cpu":
            return byte_view(tensor)[part.start : part.stop]
        return byte_view(tensor.view(torch.uint8)[part.start : part.stop].cpu())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self._path}: writing {self._nbytes} bytes failed: {reason}") from error
