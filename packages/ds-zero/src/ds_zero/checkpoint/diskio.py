"""Moving 4 MiB chunks between memory and the disk by whichever way is faster at the moment.

Writing through the page cache is fastest while the kernel has warm pages to give; on a virtual machine that must first
fault them in from its host, or under memory pressure, it is ten times slower than the disk. Writing past the cache
(O_DIRECT) runs at the speed of the disk. So the first chunks go through the cache and are timed; where it turns out
slow, direct workers join: they and the calling thread take the next chunk from one stream whenever they are free, and
the faster way does most of the work. Reading takes what the page cache holds (RWF_NOWAIT) and the rest past it.

Invariants
    chunk i is bytes `[i * CHUNK_NBYTES, ...)`; ranges never overlap, so cached and direct access never meet in a page;
    direct access goes through page-aligned bounce buffers of one chunk each: extra memory is a few chunks;
    where a file system refuses O_DIRECT everything goes through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from ds_zero.checkpoint.format import CHUNK_NBYTES

__all__ = ["aligned_buffer", "open_direct", "read_cached", "read_direct", "run_workers", "write_chunks"]

_MAX_IOV = 512
_PAGE = 4096
_DIRECT_WORKERS = 2
_PROBE_CHUNKS = 16
_SLOW_CACHE = 200e6
"""Bytes per second below which the page cache gets help; what lies in it afterwards is what makes a load fast."""


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that bypasses the page cache; None where the system or the file system has none."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


def aligned_buffer() -> memoryview:
    """One chunk of page-aligned memory."""
    return memoryview(mmap.mmap(-1, CHUNK_NBYTES))


def run_workers(bodies: Sequence[Callable[[], None]]) -> None:
    """Run all bodies, the first on the calling thread; raises the first error after all have ended."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), name="checkpoint-io") for body in bodies[1:]]
    for thread in threads:
        thread.start()
    guarded(bodies[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _ChunkWriter:
    def __init__(self, path: Path, chunks: Iterable[list[memoryview]]) -> None:
        self._path = path
        self._chunks = enumerate(chunks)
        self._lock = threading.Lock()
        self._stopped = False
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._direct: int | None = None
        self.checksums: dict[int, str] = {}
        self.nbytes = 0

    def _take(self) -> tuple[int, list[memoryview]] | None:
        with self._lock:
            taken = None if self._stopped else next(self._chunks, None)
            if taken is not None:
                self.nbytes += sum(map(len, taken[1]))
            return taken

    def _work(self, write: Callable[[int, list[memoryview]], None]) -> None:
        try:
            while (taken := self._take()) is not None:
                write(*taken)
        except BaseException:
            self._stopped = True
            raise

    def _cached(self, index: int, parts: list[memoryview]) -> None:
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        self.checksums[index] = digest.hexdigest()
        _write_all(self._fd, list(parts), index * CHUNK_NBYTES)

    def _direct_body(self) -> None:
        bounce = aligned_buffer()

        def write(index: int, parts: list[memoryview]) -> None:
            nbytes = sum(map(len, parts))
            if nbytes % _PAGE or self._direct is None:
                self._cached(index, parts)
                return
            position = 0
            for part in parts:
                bounce[position : position + len(part)] = part
                position += len(part)
            self.checksums[index] = xxhash.xxh3_64_hexdigest(bounce[:nbytes])
            try:
                _write_all(self._direct, [bounce[:nbytes]], index * CHUNK_NBYTES)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._cached(index, parts)  # O_DIRECT with rules of its own: not this way

        self._work(write)

    def _cache_is_slow(self) -> bool:
        """Write the first chunks through the cache and time them."""
        begin = time.perf_counter()
        for _ in range(_PROBE_CHUNKS):
            taken = self._take()
            if taken is not None:
                self._cached(*taken)
        return self.nbytes < _SLOW_CACHE * (time.perf_counter() - begin)

    def run(self, total_nbytes: int) -> None:
        try:
            bodies: list[Callable[[], None]] = [lambda: self._work(self._cached)]
            if total_nbytes > _PROBE_CHUNKS * CHUNK_NBYTES and self._cache_is_slow():
                self._direct = open_direct(self._path, os.O_WRONLY)
                if self._direct is not None:
                    bodies += [self._direct_body] * _DIRECT_WORKERS
            run_workers(bodies)
        finally:
            os.close(self._fd)
            if self._direct is not None:
                os.close(self._direct)


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


def write_chunks(path: Path, buffers: Iterable[memoryview], total_nbytes: int) -> tuple[int, tuple[str, ...]]:
    """Write a new file from a stream of buffers; its size and the xxh3_64 of each chunk. Not yet fsynced.

    Buffers must stay as they are until this returns.
    """
    writer = _ChunkWriter(path, _regroup(buffers))
    writer.run(total_nbytes)
    return writer.nbytes, tuple(writer.checksums[index] for index in range(len(writer.checksums)))


def _regroup(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Lists of exactly CHUNK_NBYTES (the last may be shorter) out of a stream of buffers."""
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


def read_cached(fd: int, views: list[memoryview], offset: int) -> bool:
    """Fill `views` from the page cache; False (views undefined) unless all of it was there."""
    try:
        return os.preadv(fd, views, offset, os.RWF_NOWAIT) == sum(map(len, views))
    except (OSError, AttributeError):
        return False


def read_direct(fd: int | None, bounce: memoryview, nbytes: int, offset: int) -> bool:
    """Fill the first `nbytes` of `bounce` from the disk past the page cache; False if that way is closed."""
    if fd is None:
        return False
    got = 0
    with contextlib.suppress(OSError):
        while got < nbytes and got % _PAGE == 0:
            step = os.preadv(fd, [bounce[got:]], offset + got)
            if step == 0:
                break
            got += step
    return got >= nbytes
