"""Shared-memory segments without names.

A segment is a file without a directory entry (``O_TMPFILE`` on /dev/shm, or a memfd where /dev/shm is too small), which
the other ranks open through the creator's ``/proc/<pid>/fd``. Nothing can be left behind: the kernel frees it with its
last mapping, however the processes end. Pages are reserved with ``posix_fallocate`` before use, each rank its own
range, so a full memory is an error here and not a SIGBUS later.

Environment: ``DS_COMM_SHM_DIR`` another directory than /dev/shm; ``DS_COMM_SHM_LIMIT`` bytes of shared memory that the
segments of one group may take together. With either set, the memfd is not used.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_comm.log import get_logger

PAGE = mmap.PAGESIZE
_logger = get_logger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class NoSpaceError(OSError):
    """Not enough shared memory; the text names needed and free bytes. Never leaves the package."""


class Segment:
    """One mapping of shared memory. Tensors made from it keep the mapping alive.

    own: the byte range that this rank reserves now. growing: more will be reserved later, by ``reserve``.
    """

    def __init__(self, path: str, nbytes: int, own: tuple[int, int], *, growing: bool = False) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _allocate(fd, *own)
            self.nbytes = nbytes
            self._bytes = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
        except BaseException:
            os.close(fd)
            raise
        if growing:
            self._fd = fd
            weakref.finalize(self, os.close, fd)
        else:
            os.close(fd)

    def reserve(self, start: int, stop: int) -> None:
        """Make sure of the pages in [start, stop) of a growing segment; ``NoSpaceError`` where there are none."""
        _allocate(self._fd, start, stop)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] = (1,)) -> Tensor:
        """A tensor of its own (no view, own version counter) at byte ``offset``, which ``dtype`` must divide."""
        storage = self._bytes.untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)

    def words(self, offset: int, nbytes: int) -> memoryview:
        """The range as 64-bit words; an aligned word is read and written in one piece."""
        return self._view()[offset : offset + nbytes].cast("q")

    def raw(self, offset: int, nbytes: int) -> memoryview:
        return self._view()[offset : offset + nbytes]

    def _view(self) -> memoryview:
        return memoryview(self._bytes.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers

    def forget(self, start: int, stop: int) -> None:
        """Unmap the whole pages in [start, stop) from this process; the content stays and comes back when touched."""
        start, stop = round_up(start, PAGE), stop // PAGE * PAGE
        if stop > start:
            _libc.madvise(self._bytes.data_ptr() + start, stop - start, mmap.MADV_DONTNEED)


def shared_limit() -> int | None:
    """``DS_COMM_SHM_LIMIT``, or None where it is not set; ``NoSpaceError`` where it is no number."""
    limit = os.environ.get("DS_COMM_SHM_LIMIT")
    if limit is not None and not limit.isdecimal():
        raise NoSpaceError(errno.EINVAL, f"DS_COMM_SHM_LIMIT={limit!r} is not a number of bytes")
    return None if limit is None else int(limit)


def _allocate(fd: int, start: int, stop: int) -> None:
    if stop <= start:
        return
    try:
        os.posix_fallocate(fd, start, stop - start)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            text = f"reserving {stop - start:,} bytes of shared memory: {error}"
            raise NoSpaceError(error.errno, text) from error


@dataclass
class Arena:
    """Where the segments of one group are created, and how much they may take. Used by the creating rank."""

    used: int = 0
    told: bool = False
    """Whether the one line about a small /dev/shm is written."""

    def create(self, nbytes: int, *, sparse_nbytes: int = 0) -> tuple[int, str]:
        """A new segment's descriptor and the path by which the other ranks open it; ``NoSpaceError`` if too large.

        sparse_nbytes: that many more after ``nbytes``, which may stay without memory and are not counted.
        """
        limit = shared_limit()
        chosen = os.environ.get("DS_COMM_SHM_DIR")
        if limit is not None and self.used + nbytes > limit:
            raise NoSpaceError(
                errno.ENOSPC,
                f"{nbytes:,} bytes of shared memory are needed, {max(0, limit - self.used):,} are left of "
                f"DS_COMM_SHM_LIMIT={limit}",
            )
        folder = chosen or "/dev/shm"
        try:
            fd = _unnamed_file(folder, nbytes)
        except OSError as error:
            if limit is not None or chosen is not None or nbytes > _available_memory() // 2:
                raise NoSpaceError(errno.ENOSPC, error.strerror or str(error)) from error
            if not self.told:
                self.told = True
                _logger.warning("shared memory comes from a memfd, as fast, instead of %s: %s", folder, error)
            fd = os.memfd_create("ds_comm", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes + sparse_nbytes)
        self.used += nbytes
        return fd, f"/proc/{os.getpid()}/fd/{fd}"


def _unnamed_file(folder: str, nbytes: int) -> int:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < nbytes:
        raise NoSpaceError(errno.ENOSPC, f"{nbytes:,} bytes of shared memory are needed, {free:,} are free on {folder}")
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _available_memory() -> int:
    """Bytes the host says a new workload can have; 0 when it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
