"""Nameless shared memory: where it comes from, what forgetting does, what too little of it says."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch

from ds_comm.transport._segment import PAGE, Arena, NoSpaceError, Segment


def test_two_mappings_are_one_memory_and_forgetting_keeps_it() -> None:
    fd, path = Arena().create(4 * PAGE)
    first, second = Segment(path, 4 * PAGE, (0, 4 * PAGE)), Segment(path, 4 * PAGE, (0, 0))
    os.close(fd)
    tensor = first.tensor(PAGE, (8,), torch.float32)
    tensor.copy_(torch.arange(8.0))
    first.words(0, 16)[1] = 77
    first.forget(0, 4 * PAGE)
    first.forget(3, 5)
    assert second.tensor(PAGE, (2, 2), torch.float32, (4, 1)).tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert second.words(0, 16)[1] == 77
    assert tensor.tolist() == list(range(8))


def test_a_small_shm_mount_is_no_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Containers have 64 MB of /dev/shm by default; a memfd is bounded by memory alone. One line says so."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=PAGE))
    arena = Arena()
    for _ in range(2):
        fd, path = arena.create(2 * PAGE)
        assert "memfd" in os.readlink(path)
        os.close(fd)
    (line,) = caplog.messages
    assert "memfd" in line and "/dev/shm" in line and "are free" in line
    monkeypatch.setenv("DS_COMM_SHM_DIR", "/dev/shm")
    with pytest.raises(NoSpaceError, match=r"[0-9,]+ bytes of shared memory are needed, [0-9,]+ are free on /dev/shm"):
        Arena().create(2 * PAGE)


def test_the_limit_counts_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_COMM_SHM_LIMIT", str(3 * PAGE))
    arena = Arena()
    os.close(arena.create(2 * PAGE)[0])
    with pytest.raises(NoSpaceError, match="left of DS_COMM_SHM_LIMIT"):
        arena.create(2 * PAGE)
    arena.used -= 2 * PAGE
    os.close(arena.create(2 * PAGE)[0])


def test_a_limit_that_is_no_number_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_COMM_SHM_LIMIT", "1GB")
    with pytest.raises(NoSpaceError, match="DS_COMM_SHM_LIMIT='1GB' is not a number of bytes"):
        Arena().create(PAGE)


def test_a_growing_segment_takes_memory_as_it_is_reserved() -> None:
    fd, path = Arena().create(PAGE, sparse_nbytes=1 << 30)
    segment = Segment(path, PAGE + (1 << 30), (0, PAGE), growing=True)

    def blocks() -> int:
        return os.fstat(fd).st_blocks * 512

    assert blocks() == PAGE
    segment.reserve(PAGE, 11 * PAGE)
    segment.tensor(10 * PAGE, (4,), torch.uint8).fill_(1)
    assert blocks() == 11 * PAGE
    os.close(fd)


def test_reserving_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fd, path = Arena().create(PAGE, sparse_nbytes=16 * PAGE)
    segment = Segment(path, 17 * PAGE, (0, PAGE), growing=True)
    os.close(fd)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match=r"reserving 8,192 bytes of shared memory: .*No space left"):
        segment.reserve(PAGE, 3 * PAGE)
