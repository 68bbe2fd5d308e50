"""A save that returns before all is written: what may change meanwhile, what waits, and who is told of faults."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_helpers import ADAM, make_segments, ok, on_threads

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.checkpoint import diskio, full_state_dict, load, save, verify
from ds_zero.checkpoint.commit import wait_for_pending_saves
from ds_zero.errors import CheckpointError
from ds_zero.layout import ParamSpec, ShardMap, plan_shard_map
from ds_zero.state import MASTER, StateSegment, UpdateGate

ROWS, COLUMNS = 2100, 1000  # 8 MiB a key: some chunks hold nothing but private memory


def big_map(num_shards: int = 1) -> ShardMap:
    return plan_shard_map([("w", [ParamSpec("w", (ROWS, COLUMNS), "bf16", True, 0)])], num_shards=num_shards)


def private_segments(shard_map: ShardMap, rank: int, keys: tuple[str, ...] = ADAM) -> list[StateSegment]:
    segments = make_segments(shard_map, rank, export=True)
    for segment in segments:
        segment.private = frozenset(keys)
    return segments


def copies(segments: list[StateSegment]) -> list[dict[str, torch.Tensor]]:
    return [{key: tensor.clone() for key, tensor in segment.tensors.items()} for segment in segments]


def loaded(directory: Path, shard_map: ShardMap, rank: int) -> list[dict[str, torch.Tensor]]:
    targets = make_segments(shard_map, rank, fill=False)
    load(directory, targets, shard_map=shard_map, weights_only=False)
    return [segment.tensors for segment in targets]


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The background half does not begin before the event is set."""
    event, real = threading.Event(), diskio.ChunkWriter.write_cheaply

    def waiting(self: diskio.ChunkWriter) -> None:
        event.wait(30)
        real(self)

    monkeypatch.setattr(diskio.ChunkWriter, "write_cheaply", waiting)
    return event


def test_the_gate_lets_an_update_pass_when_all_is_read(tmp_path: Path, stuck: threading.Event) -> None:
    """The background half has not even begun: who waits at the gate writes the rest."""
    shard_map, gate = big_map(), UpdateGate()
    segments = private_segments(shard_map, 0)
    before = copies(segments)
    pending = save(tmp_path, "t", segments, shard_map=shard_map, gate=gate)
    written = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.safetensors"))
    assert written < 12 * ROWS * COLUMNS // 2  # most of it is still to come
    gate.wait()
    for segment in segments:
        for tensor in segment.tensors.values():
            tensor.fill_(-1.0)
    assert not pending.done
    stuck.set()
    pending.wait()
    after = loaded(tmp_path, shard_map, 0)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[key][: ROWS * COLUMNS], other[key][: ROWS * COLUMNS]) for key in ADAM)
    assert verify(tmp_path).ok


def test_what_is_not_private_may_change_at_once(tmp_path: Path, stuck: threading.Event) -> None:
    """A master that is the fp32 parameter itself: users write parameters without asking."""
    shard_map, gate = big_map(), UpdateGate()
    segments = private_segments(shard_map, 0, keys=ADAM[1:])
    before = copies(segments)
    pending = save(tmp_path, "t", segments, shard_map=shard_map, gate=gate)
    for segment in segments:
        segment.tensors[MASTER].fill_(-1.0)
    stuck.set()
    pending.wait()
    for one, other in zip(before, loaded(tmp_path, shard_map, 0), strict=True):
        assert all(torch.equal(one[key][: ROWS * COLUMNS], other[key][: ROWS * COLUMNS]) for key in ADAM)


def test_without_a_gate_nothing_is_deferred(tmp_path: Path, stuck: threading.Event) -> None:
    shard_map = big_map()
    segments = private_segments(shard_map, 0)
    before = copies(segments)
    pending = save(tmp_path, "t", segments, shard_map=shard_map)
    for segment in segments:
        for tensor in segment.tensors.values():
            tensor.fill_(-1.0)
    stuck.set()
    pending.wait()
    for one, other in zip(before, loaded(tmp_path, shard_map, 0), strict=True):
        assert all(torch.equal(one[key][: ROWS * COLUMNS], other[key][: ROWS * COLUMNS]) for key in ADAM)


def fail_later(monkeypatch: pytest.MonkeyPatch, rank: int, error: Callable[[], BaseException]) -> None:
    """Writing fails on one rank once the first half of its save is over."""
    real, begun = os.pwritev, threading.Event()
    cheaply = diskio.ChunkWriter.write_cheaply

    def broken(fd: int, parts: Any, offset: int) -> int:
        if begun.is_set() and f"shard_{rank:05d}" in os.readlink(f"/proc/self/fd/{fd}"):
            raise error()
        return real(fd, parts, offset)

    def write_cheaply(self: diskio.ChunkWriter) -> None:
        begun.set()
        cheaply(self)

    monkeypatch.setattr(os, "pwritev", broken)
    monkeypatch.setattr(diskio.ChunkWriter, "write_cheaply", write_cheaply)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(
    "error", [lambda: OSError(errno.ENOSPC, "No space left on device"), lambda: MemoryError("none")]
)
def test_a_disk_that_fills_up_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, update: bool, error: Callable[[], BaseException]
) -> None:
    """The update goes on (the save is lost, not the training); every rank's next look at the save raises."""
    shard_map = big_map(2)
    on = ok(on_threads(2, lambda peers: save_private(tmp_path, "a", shard_map, peers)[0].wait()))
    assert len(on) == 2
    fail_later(monkeypatch, rank, error)

    def body(peers: Any) -> Any:
        pending, gate = save_private(tmp_path, "b", shard_map, peers)
        if update:
            gate.wait()
        return pending.wait()

    for result in on_threads(2, body):
        assert isinstance(result, CheckpointError)
        assert f"rank {rank}: " in str(result)
        assert f"shard_{rank:05d}-of-00002.safetensors" in str(result) or isinstance(error(), MemoryError)
        assert str(error().args[-1]) in str(result)
    monkeypatch.undo()
    wait_for_pending_saves()
    assert (tmp_path / "latest").read_text() == "a"
    ok(on_threads(2, lambda peers: save_private(tmp_path, "b", shard_map, peers)[0].wait()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest", "zero_to_fp32.py"]


def save_private(directory: Path, tag: str, shard_map: ShardMap, peers: Any) -> tuple[Any, UpdateGate]:
    gate = UpdateGate()
    segments = private_segments(shard_map, peers.rank)
    return save(directory, tag, segments, shard_map=shard_map, peers=peers, gate=gate), gate


def test_a_signal_at_the_gate_leaves_it_closed() -> None:
    gate, calls = UpdateGate(), []

    def finish() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    gate.hold(finish)
    with pytest.raises(KeyboardInterrupt):
        gate.wait()
    gate.wait()
    gate.wait()
    assert len(calls) == 2


# -- with a model -----------------------------------------------------------------------------------------------------

OUT = 3300
"""Output features: two ranks hold 6.6 MB of each key, so that chunks of every key are deferred."""

WRITERS: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda model, zero: train(model, zero),
    "set_param": lambda model, zero: ds_zero.safe_set_full_fp32_param(model.weight, torch.ones(OUT, 1000)),
    "set_state": lambda model, zero: ds_zero.safe_set_full_optimizer_state(
        model.weight, torch.ones(OUT, 1000), "exp_avg"
    ),
    "edit": lambda model, zero: edit(model),
    "load": lambda model, zero: zero.load_state_dict(
        {**zero.state_dict(), "fp32_flat_groups": [torch.ones_like(s.parameter) for s in zero.inner.segments]}
    ),
    "import": lambda model, zero: [t.fill_(1) for s in zero.import_targets() for t in s.tensors.values()],
}


def train(model: Any, zero: Any) -> None:
    torch.manual_seed(ds_comm.get_rank())
    zero.backward(model(torch.randn(4, 1000, dtype=zero.sharded.units[0].storage.full.dtype)).float().square().mean())
    zero.step()


def edit(model: Any) -> None:
    with ds_zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        model.weight.mul_(3.0)


def change_after_save(folder: Path, stage: int, dtype: str, what: str) -> tuple[bool, bool]:
    """Save, change at once, and see what was saved: (weights, moments) as they were?"""
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, OUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, zero = ds_zero.shard(model, optimizer, config={"stage": stage, "dtype": dtype})
    train(model, zero)
    weight = ds_zero.safe_get_full_fp32_param(model.weight)
    moment = ds_zero.safe_get_full_optimizer_state(model.weight, "exp_avg")
    real, slow = diskio.ChunkWriter.write_cheaply, threading.Event()
    diskio.ChunkWriter.write_cheaply = lambda self: (slow.wait(30), real(self))[1]  # type: ignore[method-assign]
    try:
        pending = save(folder, "t", zero.export_state(), shard_map=zero.shard_map, gate=zero.gate)
        WRITERS[what](model, zero)
        slow.set()
        pending.wait()
    finally:
        diskio.ChunkWriter.write_cheaply = real  # type: ignore[method-assign]
    ds_comm.barrier()
    found = full_state_dict(folder)["weight"]
    targets = zero.import_targets({"exp_avg": torch.float32})
    load(folder, targets, shard_map=zero.shard_map)
    zero.finish_import(targets)
    again = ds_zero.safe_get_full_optimizer_state(model.weight, "exp_avg")
    return torch.equal(found, weight), torch.equal(again, moment)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("what", list(WRITERS))
def test_no_writer_of_the_state_overtakes_a_save(tmp_path: Path, stage: int, dtype: str, what: str) -> None:
    assert run_ranks(change_after_save, 2, tmp_path, stage, dtype, what) == [(True, True)] * 2


# -- the page cache ---------------------------------------------------------------------------------------------------


def test_filling_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 40_000)
    populated: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, policy, parameter: None)  # this is the main thread
    monkeypatch.setattr(diskio, "_populate", lambda window, nbytes: populated.append(nbytes))
    monkeypatch.setattr(diskio, "_FILL_NBYTES", 4 << 20)
    monkeypatch.setattr(diskio.os, "major", lambda device: 8)
    diskio.fill_cache(path, 1, lambda: True)
    assert sum(populated) == path.stat().st_size and len(populated) == 3
    populated.clear()
    diskio.fill_cache(path, 1 << 60, lambda: True)  # more than the memory
    diskio.fill_cache(path, 1, lambda: False)
    monkeypatch.setattr(diskio.os, "major", lambda device: 0)  # no block device
    diskio.fill_cache(path, 1, lambda: True)
    assert not populated
    monkeypatch.undo()
    filler = threading.Thread(target=diskio.fill_cache, args=(path, 1, lambda: True))
    filler.start()
    filler.join()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER  # of this thread
    assert path.read_bytes() == bytes(range(256)) * 40_000


def test_a_file_that_is_cut_short_while_the_cache_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error, and above all no SIGBUS: filling is a favour."""
    path = tmp_path / "x"
    path.write_bytes(bytes(12 << 20))
    real = diskio._populate

    def cut(window: Any, nbytes: int) -> None:
        real(window, nbytes)
        os.truncate(path, 5 << 20)

    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, policy, parameter: None)
    monkeypatch.setattr(diskio, "_populate", cut)
    monkeypatch.setattr(diskio, "_FILL_NBYTES", 8 << 20)
    monkeypatch.setattr(diskio.os, "major", lambda device: 8)
    with contextlib.suppress(ValueError):  # as the caller does: the next window lies behind the end
        diskio.fill_cache(path, 1, lambda: True)
    assert path.stat().st_size == 5 << 20
