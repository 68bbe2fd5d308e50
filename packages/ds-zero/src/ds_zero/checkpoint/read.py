"""Opening a checkpoint and reading ranges of it straight into tensors, every touched chunk verified.

Vocabulary
    request   elements of the stored bytes that go to one contiguous 1-D tensor.
    part      what of a request lies in one chunk.

A chunk that the page cache holds is read with one `preadv`, its parts directly into their tensors and the bytes
nobody asked for into scratch, and hashed while still in the processor's cache. A chunk that must come from the disk
goes past the page cache through scratch, as does one whose dtype differs, whose tensor is not on the CPU, or whose
parts overlap. Two workers take turns, so that one hashes and copies while the other waits for the disk; extra memory
is two chunks.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash

from ds_zero.checkpoint import durable
from ds_zero.checkpoint.diskio import aligned_buffer, open_direct, read_cached, read_direct, run_workers
from ds_zero.checkpoint.format import CHUNK_NBYTES, byte_view, dtype_from_name
from ds_zero.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, intersect
from ds_zero.errors import CheckpointError
from ds_zero.state import MASTER, PARAM

__all__ = ["Checkpoint", "Part", "Request", "Want", "open_checkpoint", "other_tags", "resolve_tag"]

_MAX_IOV = 512
_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Request:
    """Bytes `[offset, offset + nbytes)` of file number `file`, stored as `dtype`, go to `target` (1-D)."""

    file: int
    offset: int
    dtype: torch.dtype
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True)
class Want:
    """Elements `[start, start + numel)` of state `key` of the parameter stored as `name` go to `target` (1-D)."""

    name: str
    key: str
    start: int
    target: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Part:
    low: int
    high: int
    request: Request
    memory: memoryview | None


def resolve_tag(directory: Path, tag: str | None) -> str | None:
    """`tag`, or what `latest` names; None if neither exists.

    Raises:
        CheckpointError: the directory, or the tag's directory or manifest, is not there; names the tags that are.
    """
    if not directory.is_dir():
        if tag is None:
            return None
        raise CheckpointError(f"{directory} is not a directory; expected the folder that holds checkpoint {tag!r}")
    from_latest = tag is None
    tag = durable.read_latest(directory) if tag is None else tag
    if tag is None:
        return None
    if durable.tag_directory(directory, tag) is None:
        source = f"{directory / durable.LATEST} names" if from_latest else f"{directory} has no complete checkpoint"
        lacks = "has no manifest.json (its save never finished)" if (directory / tag).is_dir() else "does not exist"
        if any((directory / tag).glob("*_states.pt")):
            lacks = "was written by upstream DeepSpeed; load it into an engine with allow_pickle=True and save it again"
        raise CheckpointError(f"{source} {tag!r}, but {directory / tag} {lacks}; {other_tags(directory, tag)}")
    return tag


def other_tags(directory: Path, tag: str | None) -> str:
    """A clause for error messages: which other tags are complete (all files there, in full size)."""
    whole: list[str] = []
    for other in durable.committed_tags(directory):
        if other != tag:
            try:
                Checkpoint(directory, other).check_sizes()
            except CheckpointError:
                continue
            whole.append(other)
    if not whole:
        return "no other tag in this directory is complete"
    return f"other tags that are complete: {', '.join(whole[:5])}"


def open_checkpoint(directory: str | os.PathLike[str], tag: str | None = None) -> Checkpoint:
    """Open a checkpoint (the one `latest` names when `tag` is None) for reading; reads only the manifest.

    Raises:
        CheckpointError: nothing to open, or its manifest is damaged.
    """
    root = Path(directory)
    found = resolve_tag(root, tag)
    if found is None and (root / MANIFEST_NAME).is_file():  # the tag directory itself was given
        return Checkpoint(root.absolute().parent, root.absolute().name)
    if found is None:
        raise CheckpointError(f"{root} has no {durable.LATEST!r} file; {other_tags(root, None)}")
    return Checkpoint(root, found)


class Checkpoint:
    """One committed checkpoint: its manifest, and verified reads of any ranges."""

    def __init__(self, directory: Path, tag: str) -> None:
        path = durable.tag_directory(directory, tag)
        if path is None:
            raise CheckpointError(f"{directory / tag} is not a complete checkpoint: it has no {MANIFEST_NAME}")
        self.directory = directory
        self.tag = tag
        self.path = path
        self.manifest = Manifest.from_json(_read_text(path / MANIFEST_NAME), str(path / MANIFEST_NAME))

    def check_sizes(self, files: Iterable[int] | None = None) -> None:
        """CheckpointError unless the files (default: all) are there in full size."""
        for index in range(len(self.manifest.files)) if files is None else files:
            record = self.manifest.files[index]
            path = self.path / record.name
            try:
                found = path.stat().st_size
            except OSError:
                raise CheckpointError(f"{path} is missing; expected {record.nbytes} bytes") from None
            if found != record.nbytes:
                what = "cut short" if found < record.nbytes else "longer than written"
                raise CheckpointError(f"{path} is {what}: it has {found} bytes, expected {record.nbytes}")

    def _requests(self, want: Want) -> Iterator[Request]:
        record = self.manifest.params[want.name].keys[want.key]
        dtype = dtype_from_name(record.dtype)
        for span in intersect(record.spans, want.start, want.start + want.target.numel(), dtype.itemsize):
            target = want.target[span.start - want.start : span.stop - want.start]
            yield Request(span.file, span.offset, dtype, target)

    def fill(
        self, wants: Iterable[Want], progress: Callable[[int], None] | None = None, *, direct: bool = True
    ) -> None:
        """Read the wanted ranges straight into their targets; errors as `execute`."""
        self.execute([request for want in wants for request in self._requests(want)], progress, direct=direct)

    def value_key(self, name: str) -> str:
        """Where the parameter's value is: its fp32 master if it was trained, else the parameter itself."""
        keys = self.manifest.params[name].keys
        return MASTER if MASTER in keys else PARAM

    def read(self, name: str, key: str | None = None, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One whole state of one parameter in its global shape; `key` None is its value; converted to `dtype`."""
        param = self.manifest.params[name]
        key = self.value_key(name) if key is None else key
        stored = dtype_from_name(param.keys[key].dtype)
        flat = torch.empty(param.numel, dtype=stored if dtype is None else dtype)
        self.fill([Want(name, key, 0, flat)])
        return flat.view(param.shape)

    def read_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The whole tensors ("buffer/", "extra/") whose name begins with `prefix`, by full name."""
        found: dict[str, torch.Tensor] = {}
        requests: list[Request] = []
        for name, record in self.manifest.tensors.items():
            if name.startswith(prefix):
                dtype = dtype_from_name(record.dtype)
                flat = torch.empty(math.prod(record.shape), dtype=dtype)
                found[name] = flat.view(record.shape)
                requests.append(Request(record.file, record.offset, dtype, flat))
        self.execute(requests)
        return found

    def execute(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None, *, direct: bool = True
    ) -> None:
        """Carry out requests, each touched chunk verified; `progress` gets the bytes of each chunk done.

        `direct` False reads what is not cached through the page cache: right when other ranks want the same bytes.

        Raises:
            CheckpointError: a file is missing or cut short, or a checksum differs; names file, chunk, found, expected.
                Targets may be partly overwritten by then.
        """
        by_file: dict[int, list[Request]] = {}
        for request in requests:
            if request.target.numel():
                by_file.setdefault(request.file, []).append(request)
        self.check_sizes(by_file)
        for file, items in sorted(by_file.items()):
            chunks = list(_parts_by_chunk(_merge_adjacent(items)))
            self.read_chunks(file, chunks, progress, direct=direct)

    def read_chunks(
        self,
        file: int,
        chunks: Sequence[tuple[int, Sequence[Part]]],
        progress: Callable[[int], None] | None = None,
        *,
        direct: bool = True,
        errors: list[CheckpointError] | None = None,
    ) -> None:
        """Read and verify chunks of one file; with `errors` a damaged chunk is noted there and the rest still read."""
        record = self.manifest.files[file]
        path = self.path / record.name
        pending = iter(chunks)
        lock = threading.Lock()
        failed: list[tuple[int, CheckpointError]] = []

        def body() -> None:
            scratch = aligned_buffer()
            while True:
                with lock:
                    taken = next(pending, None) if errors is not None or not failed else None
                if taken is None:
                    return
                try:
                    nbytes = ChunkReader(fd, direct_fd, path, record, scratch).read(*taken)
                except CheckpointError as error:
                    failed.append((taken[0], error))
                    continue
                if progress is not None:
                    with lock:
                        progress(nbytes)

        fd = os.open(path, os.O_RDONLY)
        direct_fd = open_direct(path, os.O_RDONLY) if direct and len(chunks) > 1 else None
        try:
            run_workers([body] * min(_WORKERS, len(chunks)))
        finally:
            os.close(fd)
            if direct_fd is not None:
                os.close(direct_fd)
        failed.sort(key=lambda item: item[0])
        if errors is not None:
            errors.extend(error for _, error in failed)
        elif failed:
            raise failed[0][1]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _merge_adjacent(requests: Iterable[Request]) -> list[Request]:
    """Sort by offset and join requests that follow one another both in the file and in memory."""
    merged: list[Request] = []
    for request in sorted(requests, key=lambda item: item.offset):
        last = merged[-1] if merged else None
        if last is not None and _continues(last, request):
            numel = last.target.numel() + request.target.numel()
            joined = last.target.as_strided((numel,), (1,), last.target.storage_offset())
            merged[-1] = dataclasses.replace(last, target=joined)
        else:
            merged.append(request)
    return merged


def _continues(last: Request, request: Request) -> bool:
    a, b = last.target, request.target
    return (
        last.stop == request.offset
        and last.dtype == request.dtype
        and a.dtype == b.dtype
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.is_contiguous()
        and b.is_contiguous()
        and a.storage_offset() + a.numel() == b.storage_offset()
    )


def _parts_by_chunk(requests: Sequence[Request]) -> Iterator[tuple[int, list[Part]]]:
    """Cut requests (sorted by offset) at chunk boundaries; chunks in order, each with its parts."""
    chunks: dict[int, list[Part]] = {}
    for request in requests:
        direct = request.target.device.type == "cpu" and request.target.dtype == request.dtype
        direct = direct and request.target.is_contiguous()
        memory = byte_view(request.target) if direct else None
        first, last = request.offset // CHUNK_NBYTES, (request.stop - 1) // CHUNK_NBYTES
        for index in range(first, last + 1):
            low = max(request.offset, index * CHUNK_NBYTES)
            high = min(request.stop, (index + 1) * CHUNK_NBYTES)
            view = None if memory is None else memory[low - request.offset : high - request.offset]
            chunks.setdefault(index, []).append(Part(low, high, request, view))
    yield from sorted(chunks.items())


class ChunkReader:
    """Reads and verifies chunks of one open shard file; `scratch` is one aligned chunk of memory."""

    def __init__(self, fd: int, direct_fd: int | None, path: Path, record: FileRecord, scratch: memoryview) -> None:
        self._fd = fd
        self._direct_fd = direct_fd
        self._path = path
        self._record = record
        self._scratch = scratch

    def read(self, index: int, parts: Sequence[Part] = ()) -> int:
        """Read chunk `index` into its parts (ascending) and verify it; number of bytes read."""
        begin = index * CHUNK_NBYTES
        nbytes = min(CHUNK_NBYTES, self._record.nbytes - begin)
        whole = [self._scratch[:nbytes]]
        views = self._direct_views(begin, begin + nbytes, parts)
        if not read_cached(self._fd, whole if views is None else views, begin):
            if read_direct(self._direct_fd, self._scratch, nbytes, begin):
                views = None
            else:
                self._fill(whole if views is None else views, index, begin)
        self._verify(whole if views is None else views, index, begin)
        if views is None:
            for part in parts:
                self._copy_out(part, begin)
        return nbytes

    def _direct_views(self, begin: int, end: int, parts: Sequence[Part]) -> list[memoryview] | None:
        """Buffers that tile the chunk, or None if it must go through scratch."""
        if not parts or len(parts) > _MAX_IOV // 2:
            return None
        views: list[memoryview] = []
        position = begin
        for part in parts:
            if part.memory is None or part.low < position:
                return None
            if part.low > position:
                views.append(self._scratch[: part.low - position])
            views.append(part.memory)
            position = part.high
        if position < end:
            views.append(self._scratch[: end - position])
        # Gaps share one scratch, so only one gap can still be hashed after the read.
        gaps = sum(view.obj is self._scratch.obj for view in views)
        return views if gaps <= 1 else None

    def _fill(self, views: list[memoryview], index: int, begin: int) -> None:
        position, waiting = begin, list(views)
        while waiting:
            got = os.preadv(self._fd, waiting, position)
            if got == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {position}, inside chunk {index}; expected {self._record.nbytes} bytes"
                )
            position += got
            while waiting and got >= len(waiting[0]):
                got -= len(waiting[0])
                waiting.pop(0)
            if got:
                waiting[0] = waiting[0][got:]

    def _verify(self, views: list[memoryview], index: int, begin: int) -> None:
        digest = xxhash.xxh3_64()
        for view in views:
            digest.update(view)
        found, expected = digest.hexdigest(), self._record.chunks[index]
        if found != expected:
            raise CheckpointError(
                f"{self._path}: chunk {index} (bytes {begin}..{begin + sum(map(len, views))}) has checksum {found}, "
                f"expected {expected}; the file was changed or damaged after it was written"
            )

    def _copy_out(self, part: Part, begin: int) -> None:
        raw = self._scratch[part.low - begin : part.high - begin]
        if part.memory is not None:
            part.memory[:] = raw
            return
        request = part.request
        first = (part.low - request.offset) // request.dtype.itemsize
        values = torch.frombuffer(raw, dtype=request.dtype)
        request.target[first : first + values.numel()].copy_(values)
