"""From a shard that is partly written to a durable checkpoint: the background half of a save.

Every rank runs `Commit.run` in a thread that exit waits for. Ranks talk through files in the temporary directory,
never through the process group, which belongs to the training loop:

    done_00003.json     rank 3's shard is on the disk; its record (pieces, checksums)
    failed_00003        rank 3 could not; why
    failed              rank 0 gave the save up; why (read by all ranks)

Rank 0 waits for all records, merges them, and then in this order: manifest, fsync of the directory, rename to the tag,
fsync of the parent, `latest`. A crash before the rename leaves the previous checkpoint and a stale directory; a crash
after it leaves a complete checkpoint, at worst without `latest` naming it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_comm.log import get_logger
from ds_zero.checkpoint import diskio, durable
from ds_zero.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    RankRecord,
    merge,
    record_from_json,
    record_to_json,
    shard_file_name,
)
from ds_zero.checkpoint.script import SCRIPT, SCRIPT_NAME
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN, ShardMap

__all__ = ["Commit", "PendingSave", "wait_for_pending_saves"]

_LOGGER = get_logger(__name__)
_POLL_SECONDS = 0.005
_POLL_MAX_SECONDS = 0.1
_ALIVE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Commit:
    """What the background half of one rank knows. `identities[r]` tells whether rank r's process still lives.

    `write()` writes what the shard still lacks and describes it; `nbytes` counts the shards of all ranks.
    """

    directory: Path
    tag: str
    nonce: str
    temporary: Path
    rank: int
    write: Callable[[], RankRecord]
    nbytes: int
    identities: tuple[tuple[str, int, int], ...]
    shard_map: ShardMap
    ds_version: str
    save_latest: bool
    exclude_frozen: bool
    timeout: float

    @property
    def size(self) -> int:
        return len(self.identities)

    def run(self) -> None:
        """Finish this rank's shard, make it durable, then commit (rank 0) or learn what rank 0 did (others)."""
        try:
            record = self.write()
            durable.fsync_path(self.temporary / record.file.name)
            self._post(f"done_{self.rank:05d}.json", record_to_json(record))
        except Exception as error:  # of whatever kind: the other ranks wait for this one
            reason = f"rank {self.rank}: {error}"
            given_up = (self.temporary / "failed").exists()  # then rank 0 has removed the shards
            if not given_up:
                self._post(f"failed_{self.rank:05d}", reason)
            if self.rank != 0 and not given_up:
                raise self._error(reason) from error
        if self.rank == 0:
            self._lead()
        else:
            self._follow()

    def fill_cache(self) -> None:
        """Afterwards: bring this rank's shard into the page cache, so that a load after a save is fast."""
        shard = self.directory / self.tag / shard_file_name(self.rank, self.size)
        with contextlib.suppress(OSError, ValueError):  # replaced, removed or cut short meanwhile
            diskio.fill_cache(shard, self.nbytes, threading.main_thread().is_alive)

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.tag!r} in {self.directory} was not saved: {reason}; the previous checkpoint is untouched"
        )

    def _post(self, name: str, content: str) -> None:
        """Show a small file to the other ranks, whole or (disk full) empty."""
        target = self.temporary / name
        partial = self.temporary / f".{name}"
        try:
            partial.write_text(content, encoding="utf-8")
        except OSError:
            if name.startswith("done"):
                raise
            with contextlib.suppress(OSError):
                partial.touch()
        with contextlib.suppress(FileNotFoundError):
            os.rename(partial, target)

    def _lead(self) -> None:
        try:
            records = self._collect()
            manifest = self._manifest(records)
            durable.write_durably(self.temporary / MANIFEST_NAME, manifest.to_json())
            for leftover in self.temporary.glob("done_*.json"):
                leftover.unlink()
            durable.fsync_path(self.temporary)
            durable.replace_directory(self.temporary, self.directory / self.tag, self.nonce)
        except Exception as error:
            self._post("failed", str(error))
            for shard in self.temporary.glob("*.safetensors"):
                shard.unlink(missing_ok=True)
            raise self._error(str(error)) from error
        self._point_at_it()

    def _point_at_it(self) -> None:
        """The checkpoint is there; now what stands beside it: the script, and `latest`."""
        try:
            durable.release(self.directory / self.tag)
            self._write_script()
            if self.save_latest:
                durable.write_durably(self.directory / durable.LATEST, self.tag)
        except OSError as error:
            named = durable.read_latest(self.directory) if self.save_latest else self.tag
            raise CheckpointError(
                f"checkpoint {self.tag!r} is complete in {self.directory}, but not what stands beside it: {error}"
                + ("" if named == self.tag else f"; {durable.LATEST!r} names {named!r}, load it with tag={self.tag!r}")
            ) from error

    def _write_script(self) -> None:
        script = self.directory / SCRIPT_NAME
        if not script.exists() or script.read_text(encoding="utf-8") != SCRIPT:
            durable.write_durably(script, SCRIPT, mode=0o755)

    def _manifest(self, records: list[RankRecord]) -> Manifest:
        params, tensors = merge(records)
        for unit in self.shard_map.units:
            for slot in unit.slots:
                skipped = self.exclude_frozen and slot.group == FROZEN
                if slot.name not in params and slot.numel and not skipped:
                    raise CheckpointError(f"no rank exported parameter {slot.name!r}; exports must cover the model")
        return Manifest(
            tag=self.tag,
            nonce=self.nonce,
            ds_version=self.ds_version,
            world_size=self.size,
            num_shards=self.shard_map.num_shards,
            state_shards=self.shard_map.state_shards,
            exclude_frozen=self.exclude_frozen,
            files=[record.file for record in records],
            params=params,
            tensors=tensors,
            extra=records[0].extra,
            rank_extra=[record.rank_extra for record in records],
        )

    def _collect(self) -> list[RankRecord]:
        """All ranks' records, in rank order; raises when one failed, died or is too late."""
        records: dict[int, RankRecord] = {}
        for _ in self._polls(lambda: set(range(self.size)) - set(records)):
            for name in os.listdir(self.temporary):
                if name.startswith("failed_"):
                    reason = (self.temporary / name).read_text(encoding="utf-8")
                    raise CheckpointError(reason or f"rank {int(name[-5:])}: no space for the reason; see its log")
                if name.startswith("done_") and int(name[5:10]) not in records:
                    text = (self.temporary / name).read_text(encoding="utf-8")
                    records[int(name[5:10])] = record_from_json(text)
            if len(records) == self.size:
                break
        return [records[rank] for rank in range(self.size)]

    def _follow(self) -> None:
        target = self.directory / self.tag
        for _ in self._polls(lambda: {0}):
            failed = self.temporary / "failed"
            if failed.exists():
                raise self._error(failed.read_text(encoding="utf-8") or "rank 0: no space for the reason; see its log")
            if _nonce_of(target) == self.nonce:
                return
            if not self.temporary.exists():  # renamed by rank 0, and maybe already replaced or pruned
                return

    def _polls(self, awaited: Callable[[], set[int]]) -> Iterator[None]:
        """Yield until the caller is content; CheckpointError naming the awaited ranks that died or are too late."""
        deadline = time.monotonic() + self.timeout
        next_check = 0.0
        pause = _POLL_SECONDS
        while True:
            now = time.monotonic()
            dead: set[int] = set()
            if now >= next_check:
                dead = {rank for rank in awaited() if not durable.is_alive(*self.identities[rank])}
                next_check = now + _ALIVE_SECONDS
            yield
            if dead & awaited():
                raise self._error(f"{_ranks(dead & awaited())} ended before the save was complete")
            if now > deadline:
                raise self._error(f"{_ranks(awaited())} did not finish within {self.timeout:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_MAX_SECONDS)


def _ranks(ranks: set[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _nonce_of(directory: Path) -> str | None:
    try:
        with open(directory / MANIFEST_NAME, encoding="utf-8") as file:
            head = file.read(4096)
    except OSError:
        return None
    marker = '"nonce":'
    return None if marker not in head else str(json.JSONDecoder().raw_decode(head, head.index(marker) + len(marker))[0])


class PendingSave:
    """A save that goes on in the background. `wait()` returns when it is durable and raises if it failed."""

    def __init__(self, commit: Commit) -> None:
        self.tag = commit.tag
        self.path = commit.directory / commit.tag
        self._commit = commit
        self._error: BaseException | None = None
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{commit.tag}")  # exit joins it
        with _PENDING_LOCK:
            _PENDING.append(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._commit.run()
        except Exception as error:
            self._error = error
            _LOGGER.error("%s", error)
        self._settled.set()
        if self._error is None:
            self._commit.fill_cache()

    @property
    def done(self) -> bool:
        """Whether the outcome is known (wait() will not block)."""
        return self._settled.is_set()

    def wait(self) -> Path:
        """Block until the checkpoint is durable; its directory.

        Raises:
            CheckpointError: on every rank, if any rank could not write; names the ranks.
        """
        self._settled.wait()
        with _PENDING_LOCK:
            if self in _PENDING:
                _PENDING.remove(self)
        if self._error is not None:
            raise self._error
        return self.path


_PENDING: list[PendingSave] = []
_PENDING_LOCK = threading.Lock()


def wait_for_pending_saves() -> None:
    """Wait for every save of this process; raises the first failure that nobody has seen yet."""
    with _PENDING_LOCK:
        pending = list(_PENDING)
    for save in pending:
        save.wait()
