"""Damage of every kind is named, and a failed or killed save leaves what was there before."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ckpt_helpers import assert_true, make_map, make_segments, ok, on_threads, save_on_threads

from ds_zero.checkpoint import committed_tags, durable, load, open_checkpoint, save, verify
from ds_zero.checkpoint.commit import wait_for_pending_saves
from ds_zero.errors import CheckpointError


def load_one(directory: Path, **options: Any) -> Any:
    shard_map = make_map(1)
    targets = make_segments(shard_map, 0, fill=False)
    loaded = load(directory, targets, shard_map=shard_map, **options)
    assert_true(targets)
    return loaded


def shard(directory: Path, rank: int = 1, size: int = 2) -> Path:
    return directory / f"shard_{rank:05d}-of-{size:05d}.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Tags "a" and "b" (latest), saved by two ranks."""
    ok(save_on_threads(tmp_path, "a", 2))
    ok(save_on_threads(tmp_path, "b", 2))
    return tmp_path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit(two: Path) -> None:
    flip(shard(two / "b"), -5)
    with pytest.raises(CheckpointError) as caught:
        load_one(two)
    text = str(caught.value)
    assert "shard_00001-of-00002.safetensors: chunk 0" in text
    assert "has checksum" in text
    assert "expected" in text
    assert "other tags that are complete: a" in text
    report = verify(two)
    assert not report.ok
    assert [file.ok for file in report.files] == [True, True, False]
    assert load_one(two, tag="a").tag == "a"


def test_a_flipped_bit_in_a_later_chunk(tmp_path: Path) -> None:
    from ds_zero.layout import ParamSpec, plan_shard_map

    shard_map = plan_shard_map([("w", [ParamSpec("w", (1500, 1000), "fp32", True, 0)])], num_shards=1)
    save(tmp_path, "t", make_segments(shard_map, 0), shard_map=shard_map, asynchronous=False)
    flip(shard(tmp_path / "t", 0, 1), 9 << 20)
    with pytest.raises(CheckpointError, match=r"chunk 2 \(bytes 8388608..12582912\)"):
        load(tmp_path, make_segments(shard_map, 0), shard_map=shard_map)
    assert "chunk 2" in verify(tmp_path).errors[0]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), r"cut short: it has \d+ bytes, expected \d+"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "longer than written"),
        (lambda p: p.unlink(), "is missing; expected"),
    ],
)
def test_cut_short_and_missing_shards(two: Path, damage: Callable[[Path], Any], match: str) -> None:
    damage(shard(two / "b"))
    with pytest.raises(CheckpointError, match=match) as caught:
        load_one(two)
    assert "shard_00001" in str(caught.value)
    assert "other tags that are complete: a" in str(caught.value)
    assert not verify(two).ok
    assert verify(two, "a").ok


def test_damage_on_one_rank_is_an_error_on_all(two: Path) -> None:
    """Only one rank touches the damaged bytes; both raise, and the text says which found it."""
    shard_map = make_map(2)
    flip(shard(two / "b"), -5)

    def body(peers: Any) -> Any:
        return load(two, make_segments(shard_map, peers.rank, fill=False), shard_map=shard_map, peers=peers)

    results = on_threads(2, body)
    assert all(isinstance(result, CheckpointError) for result in results)
    assert all("rank 1: " in str(result) for result in results)


@pytest.mark.parametrize("manifest", [None, "", '{"format": "ds-zero-checkpoint"}'])
def test_damaged_manifests(two: Path, manifest: str | None) -> None:
    path = two / "b" / "manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    with pytest.raises(CheckpointError, match="manifest") as caught:
        load_one(two)
    assert manifest is not None or "other tags that are complete: a" in str(caught.value)


@pytest.mark.parametrize("old", ['"step":', '"world_size":2', '"xxh3_64":"'])
def test_a_changed_digit_in_the_manifest(two: Path, old: str) -> None:
    """Still JSON, still a manifest: only its own checksum can tell."""
    path = two / "b" / "manifest.json"
    text = path.read_text()
    place = text.rindex(old) + len(old) + (-1 if old[-1].isdigit() else 0)
    path.write_text(text[:place] + ("8" if text[place] != "8" else "9") + text[place + 1 :])
    json.loads(path.read_text())
    with pytest.raises(CheckpointError, match="checksum") as caught:
        load_one(two)
    assert "other tags that are complete: a" in str(caught.value)


def test_latest_names_nothing(two: Path) -> None:
    (two / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match=r"latest names 'gone', but .*gone does not exist; .*complete: b, a"):
        load_one(two)
    with pytest.raises(CheckpointError, match="no complete checkpoint 'nope'"):
        load_one(two, tag="nope")


@pytest.mark.parametrize("tag", ["", "a/b", ".hidden", "latest"])
def test_tags_that_cannot_be(tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        save(tmp_path, tag, [], shard_map=make_map(1))
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree(tmp_path: Path) -> None:
    shard_map = make_map(2)

    def body(peers: Any) -> Any:
        segments = make_segments(shard_map, peers.rank, export=True)
        return save(tmp_path, f"step{peers.rank}", segments, shard_map=shard_map, peers=peers).wait()

    for result in on_threads(2, body):
        assert isinstance(result, CheckpointError)
        assert "rank 0 has 'step0', rank 1 has 'step1'" in str(result)


def test_disk_full_before_writing(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_nbytes", lambda directory: 1000)
    for result in save_on_threads(two, "c", 2):
        assert isinstance(result, CheckpointError)
        assert "too full" in str(result)
        assert "1000 are free" in str(result)
    assert sorted(p.name for p in two.iterdir()) == ["a", "b", "latest", "zero_to_fp32.py"]
    assert load_one(two).tag == "b"


def test_disk_full_while_writing(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank gets ENOSPC in the middle: every rank raises, nothing stays behind, the previous checkpoint loads."""
    real = os.pwritev
    calls: list[int] = []

    def full(fd: int, parts: Any, offset: int) -> int:
        calls.append(offset)
        if "shard_00001" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", full)
    for result in save_on_threads(two, "b", 2):
        assert isinstance(result, CheckpointError)
        assert "rank 1" in str(result)
        assert "No space left on device" in str(result)
        assert "bytes are free now" in str(result)
    assert calls
    assert sorted(p.name for p in two.iterdir()) == ["a", "b", "latest", "zero_to_fp32.py"]
    monkeypatch.undo()
    assert load_one(two).tag == "b"


@pytest.mark.parametrize("failing", [0, 1])
def test_fsync_fails_in_the_background(two: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    real = os.fsync

    def broken(fd: int) -> None:
        if f"shard_{failing:05d}" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", broken)
    for result in save_on_threads(two, "c", 2):
        assert isinstance(result, CheckpointError)
        assert f"rank {failing}" in str(result)
        assert "Input/output error" in str(result)
        assert "previous checkpoint is untouched" in str(result)
    monkeypatch.undo()
    assert committed_tags(two) == ["b", "a"]
    assert load_one(two).tag == "b"
    ok(save_on_threads(two, "c", 2))
    assert sorted(p.name for p in two.iterdir()) == ["a", "b", "c", "latest", "zero_to_fp32.py"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_in_the_background_of_one_rank_ends_the_wait_of_all(
    two: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Not only the disk fails: an error of any kind is told to the ranks that wait."""

    def broken(path: Any) -> None:
        if f"shard_{rank:05d}" in str(path):
            raise RuntimeError("a defect")

    monkeypatch.setattr(durable, "fsync_path", broken)
    for result in save_on_threads(two, "c", 2, timeout=600):
        assert isinstance(result, CheckpointError)
        assert f"rank {rank}: a defect" in str(result)


def test_an_unseen_failure_is_raised_by_the_next_call(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_map = make_map(1)
    monkeypatch.setattr(durable, "replace_directory", _raise_eio)
    pending = save(two, "c", make_segments(shard_map, 0), shard_map=shard_map)
    with pytest.raises(CheckpointError, match="Input/output"):
        load_one(two)
    monkeypatch.undo()
    assert pending.done
    wait_for_pending_saves()
    assert load_one(two).tag == "b"


def test_latest_cannot_be_written(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is there all the same, and the error says so."""
    real = durable.write_durably

    def full(path: Path, content: str, **options: Any) -> None:
        if path.name == "latest":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content, **options)

    monkeypatch.setattr(durable, "write_durably", full)
    results = save_on_threads(two, "c", 2)
    assert isinstance(results[0], CheckpointError)
    assert "'c' is complete" in str(results[0])
    assert "No space left on device; 'latest' names 'b', load it with tag='c'" in str(results[0])
    monkeypatch.undo()
    assert load_one(two).tag == "b"
    assert load_one(two, tag="c").tag == "c"


def test_leftovers_of_tags_that_look_like_leftovers(two: Path) -> None:
    left = two / ".x.tmp-1.old-0123456789ab"
    (left).mkdir()
    ok(save_on_threads(two, "c", 1))
    assert (two / "x.tmp-1").is_dir()  # restored: no such tag was there


def _raise_eio(*args: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 hangs in fsync: rank 0 gives up after its timeout and says who was missing."""
    real = os.fsync
    release = time.monotonic() + 3.0

    def slow(fd: int) -> None:
        while "shard_00001" in os.readlink(f"/proc/self/fd/{fd}") and time.monotonic() < release:
            time.sleep(0.02)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    results = save_on_threads(tmp_path, "t", 2, timeout=0.5)
    assert isinstance(results[0], CheckpointError)
    assert "rank 1 did not finish within" in str(results[0])
    assert isinstance(results[1], CheckpointError)
    assert not (tmp_path / "t").exists()


def test_a_rank_that_died_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    release = time.monotonic() + 3.0

    def slow(fd: int) -> None:
        while "shard_00001" in os.readlink(f"/proc/self/fd/{fd}") and time.monotonic() < release:
            time.sleep(0.02)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(durable, "is_alive", lambda host, pid, ticks: False)
    results = save_on_threads(tmp_path, "t", 2, timeout=600)
    assert "rank 1 ended before the save was complete" in str(results[0])
    assert not (tmp_path / "t").exists()


def test_life_and_death_of_processes() -> None:
    host, pid, ticks = durable.process_identity()
    assert durable.is_alive(host, pid, ticks)
    assert not durable.is_alive(host, pid, ticks + 1)  # the same pid, another process
    assert durable.is_alive("elsewhere", pid, ticks + 1)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not durable.is_alive(host, child.pid, 1)  # a zombie
    child.wait()
    assert not durable.is_alive(host, child.pid, 1)


def test_two_step_replacement_survives_a_reader(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RENAME_EXCHANGE: between the two renames the old content is still found, and a crash there heals."""
    monkeypatch.setattr(durable, "_exchange", lambda first, second: False)
    real, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        real(source, target)
        if ".old-" in str(target):
            seen.append(load_one(two, tag="b").path.name)

    shard_map = make_map(1)
    monkeypatch.setattr(os, "rename", watched)
    monkeypatch.setattr("ds_zero.checkpoint.restore.wait_for_pending_saves", lambda: None)
    save(two, "b", make_segments(shard_map, 0), shard_map=shard_map, extra={"new": 1}, asynchronous=False)
    assert len(seen) == 1
    assert seen[0].startswith(".b.old-")
    assert load_one(two).extra == {"new": 1}
    monkeypatch.undo()
    os.rename(two / "b", two / ".b.old-0123456789ab")  # what a crash between the renames leaves
    assert load_one(two, tag="b").extra == {"new": 1}
    ok(save_on_threads(two, "c", 1))
    assert committed_tags(two) == ["c", "b", "a"]


def test_resaving_a_tag_replaces_it(two: Path) -> None:
    shard_map = make_map(1)
    save(two, "b", make_segments(shard_map, 0), shard_map=shard_map, extra={"again": True}, asynchronous=False)
    assert open_checkpoint(two, "b").manifest.world_size == 1
    assert load_one(two).extra == {"again": True}
    assert sorted(p.name for p in two.iterdir()) == ["a", "b", "latest", "zero_to_fp32.py"]


def test_save_latest_false(two: Path) -> None:
    ok(save_on_threads(two, "c", 2, save_latest=False))
    assert (two / "latest").read_text() == "b"
    assert load_one(two, tag="c").tag == "c"


CRASH = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from ckpt_helpers import make_map, make_segments
from test_faults import load_one
from ds_zero.checkpoint import committed_tags, durable, save, verify

tag = {tag!r}
shard_map = make_map(1)

def store(root, tag, generation):
    segments = make_segments(shard_map, 0)
    save(root, tag, segments, shard_map=shard_map, extra={{"generation": generation}}, asynchronous=False)

def die_at(point, count):
    seen = []
    def mortal(name, real):
        def wrapped(*args, **kwargs):
            seen.append(name)
            if seen.count(point) > count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return wrapped
    for name in ("fsync", "rename", "pwritev", "mkdir"):
        setattr(os, name, mortal(name, getattr(os, name)))
    durable._exchange = mortal("exchange", durable._exchange)
    durable.shutil.rmtree = mortal("rmtree", durable.shutil.rmtree)

def kill_at_every(point):
    root = Path({directory!r}) / point
    store(root, "b", 1)
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            die_at(point, killed)
            store(root, tag, 2)
            os._exit(7)
        status = os.waitpid(child, 0)[1]
        loaded = load_one(root)
        assert verify(root).ok
        assert (loaded.tag, loaded.extra["generation"]) in (("b", 1), (tag, 2))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 7
            assert (loaded.tag, loaded.extra["generation"]) == (tag, 2)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
        if loaded.extra["generation"] == 2:
            store(root, "b", 1)  # it had become durable before the kill: start again from the first generation
    store(root, "d", 3)
    assert not [p.name for p in root.iterdir() if p.name.startswith(".") and p.is_dir()], list(root.iterdir())
    assert load_one(root).tag == "d"
    return killed

for point in ("fsync", "rename", "pwritev", "mkdir", "exchange", "rmtree"):
    print(point, kill_at_every(point))
"""


@pytest.mark.parametrize("tag", ["b", "c"])
def test_sigkill_at_every_point(tmp_path: Path, tag: str) -> None:
    """Kill a saving process before its n-th fsync, rename, ...: what `latest` names always loads and verifies.

    Tag "b" is saved anew over itself, "c" beside it. The next save removes all that the killed ones left.
    """
    script = CRASH.format(tests=str(Path(__file__).parent), directory=str(tmp_path), tag=tag)
    run = subprocess.run([sys.executable, "-c", script], check=False, timeout=90, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    killed = dict(line.split() for line in run.stdout.splitlines())
    assert int(killed["fsync"]) >= 5
    assert int(killed["rename"]) >= 3
    assert int(killed["pwritev"]) == 1
    assert int(killed["mkdir"]) >= 1
    assert int(killed["exchange"]) == int(killed["rmtree"]) == (1 if tag == "b" else 0)


def test_exit_waits_for_the_save(tmp_path: Path) -> None:
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from ckpt_helpers import make_map, make_segments
from ds_zero.checkpoint import save
real = os.fsync
os.fsync = lambda fd: (time.sleep(0.1), real(fd))
shard_map = make_map(1)
save({str(tmp_path)!r}, "t", make_segments(shard_map, 0), shard_map=shard_map)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert load_one(tmp_path).tag == "t"
