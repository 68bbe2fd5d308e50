"""Chunks go through and past the page cache, in any mixture, with the same bytes and checksums."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from ckpt_helpers import make_segments

from ds_zero.checkpoint import diskio, load, save, verify
from ds_zero.checkpoint.format import CHUNK_NBYTES
from ds_zero.layout import ParamSpec, plan_shard_map

SIZE = 11 * CHUNK_NBYTES + 12345


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


@pytest.fixture(autouse=True)
def slow_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cache counts as slow after two chunks, so that both ways are taken."""
    monkeypatch.setattr(diskio, "_PROBE_CHUNKS", 2)
    monkeypatch.setattr(diskio, "_SLOW_CACHE", float("inf"))


def check(path: Path, data: bytes) -> None:
    cuts = [0, 3, 5_000_000, 5_000_001, 30_000_000, SIZE]
    buffers = [memoryview(data)[a:b] for a, b in itertools.pairwise(cuts)]
    nbytes, checksums = diskio.write_chunks(path, buffers, SIZE)
    assert nbytes == SIZE
    assert path.read_bytes() == data
    chunks = [data[i : i + CHUNK_NBYTES] for i in range(0, SIZE, CHUNK_NBYTES)]
    assert checksums == tuple(xxhash.xxh3_64_hexdigest(chunk) for chunk in chunks)


def test_both_ways_at_once(tmp_path: Path, data: bytes) -> None:
    check(tmp_path / "x", data)


def test_a_fast_cache_gets_no_help(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskio, "_SLOW_CACHE", 0.0)
    monkeypatch.setattr(diskio, "open_direct", lambda path, flags: pytest.fail("went past the cache"))
    check(tmp_path / "x", data)


def test_without_direct_access(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskio, "open_direct", lambda path, flags: None)
    check(tmp_path / "x", data)


def test_direct_access_with_rules_of_its_own(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that opens with O_DIRECT and then refuses to write: those chunks go through the cache."""
    real = os.pwritev

    def picky(fd: int, parts: Any, offset: int) -> int:
        if len(parts) == 1 and isinstance(parts[0].obj, diskio.mmap.mmap):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", picky)
    check(tmp_path / "x", data)


def test_short_writes_are_continued(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(diskio, "open_direct", lambda path, flags: None)
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, [parts[0][:1_000_001]], offset))
    check(tmp_path / "x", data)


def test_an_error_of_one_worker_stops_all(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: 0)
    with pytest.raises(OSError, match="No space left"):
        diskio.write_chunks(tmp_path / "x", [memoryview(data)], SIZE)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_load_from_cache_and_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, direct: bool
) -> None:
    """Same world and another one (every chunk cut), from the page cache and past it."""
    spec = ParamSpec("w", (3001, 1001), "fp32", True, 0)
    shard_map = plan_shard_map([("w", [spec])], num_shards=1)
    truth = make_segments(shard_map, 0)
    save(tmp_path, "t", truth, shard_map=shard_map, asynchronous=False)
    if not direct:
        monkeypatch.setattr("ds_zero.checkpoint.read.open_direct", lambda path, flags: None)
    if not cached:
        monkeypatch.setattr("ds_zero.checkpoint.read.read_cached", lambda fd, views, offset: False)
    targets = make_segments(shard_map, 0, fill=False)
    load(tmp_path, targets, shard_map=shard_map)
    for key, tensor in truth[0].tensors.items():
        assert torch.equal(targets[0].tensors[key][: spec.numel], tensor[: spec.numel])
    halves = plan_shard_map([("w", [spec])], num_shards=2)
    for rank in range(2):
        for part in make_segments(halves, rank, fill=False):
            load(tmp_path, [part], shard_map=halves)
            stop = min(part.stop, spec.numel)
            for key, tensor in truth[0].tensors.items():
                assert torch.equal(part.tensors[key][: stop - part.start], tensor[part.start : stop])
    assert verify(tmp_path).ok
