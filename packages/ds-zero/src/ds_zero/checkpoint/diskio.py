"""Moving 4 MiB chunks between memory and the disk by whichever way is faster or cheaper at the moment.

Writing through the page cache is fastest while the kernel has warm pages to give; on a virtual machine that must first
fault them in from its host, or under memory pressure, it is ten times slower than the disk. Writing past the cache
(O_DIRECT) runs at the speed of the disk and costs a fifth of the processor time or less.

    somebody waits   the first chunks go through the cache and are timed; where it turns out slow, direct workers join:
                     they and the calling thread take the next chunk from one stream whenever they are free, and the
                     faster way does most of the work.
    nobody waits     one worker goes past the cache, so that training keeps its cores. Who comes to wait after all
                     sends a helper, which goes through the cache (`ChunkWriter.hurry`). `fill_cache` has the kernel
                     read the file back later: what lies in the cache is what makes a load fast.

Reading takes what the page cache holds (RWF_NOWAIT) and the rest past it.

Invariants
    chunk i is bytes `[i * CHUNK_NBYTES, ...)`; ranges never overlap, so cached and direct access never meet in a page;
    direct access goes through page-aligned bounce buffers of one chunk each: extra memory is a few chunks;
    where a file system refuses O_DIRECT everything goes through the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from ds_zero.checkpoint.format import CHUNK_NBYTES

__all__ = [
    "ChunkWriter",
    "aligned_buffer",
    "fill_cache",
    "open_direct",
    "read_cached",
    "read_direct",
    "run_workers",
    "write_chunks",
]

_MAX_IOV = 512
_PAGE = 4096
_DIRECT_WORKERS = 2
_PROBE_CHUNKS = 16
_FILL_NBYTES = 32 << 20
_MADV_POPULATE_READ = 22
_SLOW_CACHE = 200e6
"""Bytes per second below which the page cache gets help; what lies in it afterwards is what makes a load fast."""


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that bypasses the page cache; None where the system or the file system has none."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


def aligned_buffer() -> memoryview:
    """One chunk of page-aligned memory, in large pages where there are any: fewer pieces for the disk's driver."""
    memory = mmap.mmap(-1, CHUNK_NBYTES)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


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


class ChunkWriter:
    """A new file, written by several threads from streams of (chunk index, its parts in memory). Not fsynced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: Iterator[tuple[int, list[memoryview]]] = iter(())
        self._changed = threading.Condition()
        self._in_flight = 0
        self._error: BaseException | None = None
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._direct: int | None = None
        self._checksums: dict[int, str] = {}

    @property
    def checksums(self) -> tuple[str, ...]:
        """xxh3_64 of each chunk, once all are written."""
        return tuple(self._checksums[index] for index in range(len(self._checksums)))

    def feed(self, chunks: Iterable[tuple[int, list[memoryview]]]) -> None:
        """The stream that the next calls write; their parts must stay as they are until it has been read."""
        with self._changed:
            self._chunks = iter(chunks)

    def write_now(self, total_nbytes: int) -> None:
        """Write the stream (about `total_nbytes`) as fast as possible; OSError if that fails."""
        bodies: list[Callable[[], None]] = [lambda: self._work(self._cached)]
        if total_nbytes > _PROBE_CHUNKS * CHUNK_NBYTES and self._cache_is_slow():
            self._open_direct()
            if self._direct is not None:
                bodies += [self._direct_body] * _DIRECT_WORKERS
        run_workers(bodies)

    def write_cheaply(self) -> None:
        """Write the stream with little processor time; OSError if that fails, here or in a helper."""
        self._open_direct()
        self._background(self._direct_body)
        self._await_idle()
        if self._error is not None:
            raise self._error

    def hurry(self) -> None:
        """Return when the stream has been read to its end (or given up), and help so that this is soon."""
        body = functools.partial(self._work, self._cached)
        helper = threading.Thread(target=self._background, args=(body,), name="checkpoint-helper")
        helper.start()  # a thread, so that a signal in the caller does not lose a chunk
        helper.join()
        self._await_idle()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the file; harmless twice."""
        for descriptor in (self._fd, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._fd, self._direct = -1, None

    def _open_direct(self) -> None:
        if self._direct is None:
            self._direct = open_direct(self._path, os.O_WRONLY)

    def _background(self, body: Callable[[], None]) -> None:
        """Run a body; its error ends the stream, and `write_cheaply` raises it."""
        try:
            body()
        except Exception as error:
            self._error = self._error or error

    def _await_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight == 0)

    def _take(self) -> tuple[int, list[memoryview]] | None:
        with self._changed:
            taken = None if self._error is not None else next(self._chunks, None)
            self._in_flight += taken is not None
            return taken

    def _write_one(self, write: Callable[[int, list[memoryview]], None]) -> int:
        """Write the next chunk; its bytes, 0 at the end of the stream."""
        taken = self._take()
        if taken is None:
            return 0
        try:
            write(*taken)
            return sum(map(len, taken[1]))
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _work(self, write: Callable[[int, list[memoryview]], None]) -> None:
        while self._write_one(write):
            pass

    def _cached(self, index: int, parts: list[memoryview]) -> None:
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        self._checksums[index] = digest.hexdigest()
        _write_all(self._fd, list(parts), index * CHUNK_NBYTES)

    def _direct_body(self) -> None:
        bounce = aligned_buffer()
        target = np.frombuffer(bounce, dtype=np.uint8)

        def write(index: int, parts: list[memoryview]) -> None:
            nbytes = sum(map(len, parts))
            if nbytes % _PAGE or self._direct is None:
                self._cached(index, parts)
                return
            position = 0
            for part in parts:  # numpy copies without holding the interpreter lock
                np.copyto(target[position : position + len(part)], np.frombuffer(part, dtype=np.uint8))
                position += len(part)
            self._checksums[index] = xxhash.xxh3_64_hexdigest(bounce[:nbytes])
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
        nbytes = sum(self._write_one(self._cached) for _ in range(_PROBE_CHUNKS))
        return nbytes < _SLOW_CACHE * (time.perf_counter() - begin)


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
    writer = ChunkWriter(path)
    try:
        writer.feed(enumerate(_regroup(buffers)))
        writer.write_now(total_nbytes)
        return os.fstat(writer.fileno()).st_size, writer.checksums
    finally:
        writer.close()


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


def fill_cache(path: Path, sharers_nbytes: int, wanted: Callable[[], bool]) -> None:
    """Bring a file into the page cache ahead of a load; stops when that is not `wanted` any more.

    The calling thread gets only processor time that nobody else wants, from here to its end. Only from a block device
    of this host (over a network it would cost others), and only if `sharers_nbytes`, what all ranks are about to read,
    fit in half of the memory that is available. The pages are read as 2 MiB each through a mapping: that takes a fifth
    of the processor time of reading them one by one.
    """
    if sharers_nbytes > _available_nbytes() // 2:
        return
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
    touched = memoryview(bytearray(1 << 20))
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        for offset in range(0, status.st_size if os.major(status.st_dev) else 0, _FILL_NBYTES):
            if not wanted():
                return
            nbytes = min(_FILL_NBYTES, status.st_size - offset)
            with mmap.mmap(file.fileno(), nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as window:
                _populate(window, nbytes)
            # A virtual machine gets some pages from its host only when the processor touches them. By reading, not
            # through the mapping: a file that was cut short meanwhile, or a bad sector, would be a SIGBUS there.
            for begin in range(offset, offset + nbytes, len(touched)):
                read_cached(file.fileno(), [touched], begin)


def _populate(window: mmap.mmap, nbytes: int) -> None:
    """Have the pages of a mapping read, without holding the interpreter lock; nothing where the system cannot."""
    view = np.frombuffer(window, dtype=np.uint8)
    address, madvise = view.ctypes.data, ctypes.CDLL(None).madvise
    for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_READ):
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    del view  # the mapping can only be closed without it


def _available_nbytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


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
