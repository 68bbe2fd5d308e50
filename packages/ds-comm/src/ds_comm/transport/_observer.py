"""Stamps out of band: how ranks without shared memory notice that they went different ways.

A daemon thread of each rank posts the rank's position (its last stamps, a heartbeat) in the group's key-value store
about twice a second. When this rank has waited for a second, the thread reads the peers' positions and compares the
stamps of the same number. Whoever finds a difference, a dead process, a rank that left or the watchdog's limit passed
writes the error text to the store; every rank raises that text, in its wait or at its next call.

Invariants
  - Posting a stamp touches no network: one append to a deque.
  - Only the thread uses the store (through a connection of its own where the store can be cloned), so that a blocking
    use of it elsewhere delays nothing here.
  - The thread never raises and never outlives ``close``.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from ds_comm.errors import CommError, DivergenceError, RankMissingError
from ds_comm.ledger import STAMP_TEXT_NBYTES, describe_stamp
from ds_comm.log import get_logger
from ds_comm.watchdog import SAME_CALLS, Patience, Peer, Watchdog

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PERIOD = 0.5
_FIRST_LOOK = 1.0
_LAST_LOOK = 30.0
_HEARTBEAT_SECONDS = 5.0
_SILENCE_SECONDS = 60.0
"""A rank on another host without a heartbeat for this long counts as dead (a busy interpreter may skip a few)."""
_KEPT = 16
_STATE = struct.Struct("<qqq")
_ERRORS: tuple[type[CommError], ...] = (CommError, DivergenceError, RankMissingError)

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Ranks:
    """Group rank -> global rank, and -> process id where that process is on this host (else None)."""

    global_ranks: tuple[int, ...]
    pids: tuple[int | None, ...]


@dataclass(frozen=True)
class _Position:
    """What one rank has posted: ``count`` stamps so far, the last of them, whether it has left."""

    count: int
    heartbeat: int
    left: bool
    stamps: tuple[bytes, ...]

    def stamp(self, number: int) -> bytes | None:
        index = number - (self.count - len(self.stamps))
        return self.stamps[index] if 0 <= index < len(self.stamps) else None

    def encode(self) -> bytes:
        return _STATE.pack(self.count, self.heartbeat, int(self.left)) + b"".join(self.stamps)

    @staticmethod
    def decode(raw: bytes) -> _Position:
        count, heartbeat, left = _STATE.unpack_from(raw)
        rest = raw[_STATE.size :]
        stamps = tuple(rest[i : i + STAMP_TEXT_NBYTES] for i in range(0, len(rest), STAMP_TEXT_NBYTES))
        return _Position(count, heartbeat, bool(left), stamps)


class Observer:
    """One rank's view of the other ranks' positions."""

    def __init__(self, store: Store, prefix: str, rank: int, ranks: Ranks, watchdog: Watchdog) -> None:
        self.rank = rank
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._prefix = prefix
        self._ranks = ranks
        self._watchdog = watchdog
        self._peers = {r: Peer(pid) for r, pid in enumerate(ranks.pids) if r != rank and pid is not None}
        self._recent: deque[bytes] = deque(maxlen=_KEPT)
        self._count = 0
        self._lock = threading.Lock()
        self._wait: Patience | None = None
        self._failure: CommError | None = None
        self._told = False
        self._stop = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, name=f"ds_comm-observer-{prefix}", daemon=True)
        self._thread.start()

    # ---- the caller's side

    def post(self, stamp: bytes) -> None:
        """Number this rank's next call."""
        self.raise_failure()
        with self._lock:
            self._recent.append(stamp)
            self._count += 1

    def raise_failure(self) -> None:
        """Raise what this rank or another has found wrong."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def fail(self, error: Exception) -> None:
        """Hand ``error`` to the thread, which tells every rank."""
        if isinstance(error, CommError) and self._failure is None:
            self._failure = error

    def block(self, wait: Callable[[float], bool], what: str, limit: float | None = None) -> None:
        """Call ``wait(seconds)`` until it is True; raises what is found wrong meanwhile."""
        with self.watching(what, limit):
            while not wait(0.1):
                self.raise_failure()

    @contextmanager
    def watching(self, what: str, limit: float | None = None) -> Iterator[None]:
        """While inside, this rank counts as waiting in ``what``: the thread looks at the peers.

        A RuntimeError inside (a broken connection: most likely a peer died) becomes the error that the thread finds to
        be behind it. A wait that nothing can interrupt is watched too: what is found is logged, and raised at its end.
        """
        self._wait = Patience(self._watchdog if limit is None else Watchdog(limit), what)
        try:
            yield
        except CommError:
            raise
        except RuntimeError as error:
            self.explain(error, what)
        finally:
            self._wait = None

    def explain(self, error: Exception, what: str) -> NoReturn:
        """Raise what lies behind a failed torch operation, once the thread has had the time to find it."""
        if self._wait is None:
            self._wait = Patience(self._watchdog, what)
        deadline = time.monotonic() + 3 * _PERIOD + _FIRST_LOOK
        try:
            while time.monotonic() < deadline:
                self.raise_failure()
                time.sleep(0.05)
        finally:
            self._wait = None
        raise CommError(f"{what} failed on rank {self._global(self.rank)}: {error}") from error

    def close(self) -> None:
        """Say that this rank has left, and end the thread."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        for peer in self._peers.values():
            peer.close()

    # ---- the thread's side

    def _run(self) -> None:
        posted, posted_at, next_look = -1, 0.0, _FIRST_LOOK
        heartbeat = 0
        lost: str | None = None
        while not self._stop.wait(_PERIOD):
            try:
                now = time.monotonic()
                if self._count != posted or now - posted_at >= _HEARTBEAT_SECONDS:
                    heartbeat += 1
                    posted, posted_at = self._publish(heartbeat, left=False), now
                self._hear()
                wait = self._wait
                if wait is None:
                    next_look = _FIRST_LOOK
                elif wait.waited >= next_look and self._failure is None:
                    next_look = wait.waited + min(wait.waited, _LAST_LOOK)
                    self._look(wait)
            except Exception as error:
                # the store's host may just be ending; it only matters to a rank that waits
                lost = lost or str(error)
                if self._wait is not None and self._wait.waited > _FIRST_LOOK and self._failure is None:
                    self._failure = self._diagnose_lost_store(lost)
        try:
            self._publish(heartbeat + 1, left=True)
            self._hear()
        except Exception as error:
            _logger.debug("leaving without a word, the store is gone: %s", error)

    def _publish(self, heartbeat: int, *, left: bool) -> int:
        with self._lock:
            state = _Position(self._count, heartbeat, left, tuple(self._recent))
        self._set(f"{self._prefix}/at/{self.rank}", state.encode())
        return state.count

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]  # torch's stub forgets bytes

    def _hear(self) -> None:
        """Exchange failures with the other ranks."""
        key = f"{self._prefix}/failed"
        if self._told:
            return
        if self._store.check([key]):
            raw = self._store.get(key)
            self._told = True
            if self._failure is None:
                self._failure = _ERRORS[raw[0]](raw[1:].decode(errors="replace"))
                _logger.error("%s", self._failure)
        elif self._failure is not None:
            kind = next(i for i in reversed(range(len(_ERRORS))) if isinstance(self._failure, _ERRORS[i]))
            self._set(key, bytes([kind]) + str(self._failure).encode())
            self._told = True

    def _look(self, wait: Patience) -> None:
        """Compare positions with every peer's; sets the failure that is found."""
        with self._lock:
            own = _Position(self._count, 0, False, tuple(self._recent))
        positions = {self.rank: own}
        for rank in range(len(self._ranks.global_ranks)):
            key = f"{self._prefix}/at/{rank}"
            if rank != self.rank and self._store.check([key]):
                positions[rank] = _Position.decode(self._store.get(key))
        for number in range(max(0, own.count - _KEPT), own.count):
            stamps = {r: stamp for r, p in positions.items() if (stamp := p.stamp(number)) is not None}
            if len(set(stamps.values())) > 1:
                self._settle(DivergenceError(self._describe_divergence(number, stamps, positions)))
                return
        missing = self._find_missing(own, positions, wait)
        if missing is not None:
            self._settle(RankMissingError(f"{wait.what}: {missing}. {self._describe(positions)}"))
            return
        wait.notice(lambda: self._describe(positions))

    def _settle(self, error: CommError) -> None:
        """Make ``error`` the failure of every rank, unless another rank was first: then its error counts."""
        self._hear()
        if self._failure is None:
            self._failure = error
            self._hear()

    def _find_missing(self, own: _Position, positions: dict[int, _Position], wait: Patience) -> str | None:
        now = time.monotonic()
        for rank, peer in self._peers.items():
            if peer.gone():
                return f"rank {self._global(rank)} has died (process {peer.pid})"
        for rank, position in positions.items():
            if rank == self.rank:
                continue
            if position.left and position.count < own.count:
                return f"rank {self._global(rank)} has left the group"
            beat, since = self._seen.get(rank, (-1, now))
            self._seen[rank] = (position.heartbeat, now if beat != position.heartbeat else since)
            if rank not in self._peers and now - self._seen[rank][1] > _SILENCE_SECONDS:
                return f"rank {self._global(rank)} has given no sign of life for {now - self._seen[rank][1]:.0f} s"
        if wait.exhausted:
            behind = [r for r in range(len(self._ranks.global_ranks)) if r not in positions]
            behind += [r for r, p in positions.items() if p.count < own.count]
            names = ", ".join(str(self._global(r)) for r in sorted(behind)) or "unknown"
            return f"rank {names} did not come within {wait.limit:g} s (ds_comm.set_watchdog)"
        return None

    def _diagnose_lost_store(self, error: str) -> CommError:
        what = self._wait.what if self._wait is not None else "waiting"
        for rank, peer in self._peers.items():
            if peer.gone():
                return RankMissingError(f"{what}: rank {self._global(rank)} has died (process {peer.pid})")
        return RankMissingError(f"{what}: the group's store, which rank 0 usually hosts, does not answer: {error}")

    def _describe_divergence(self, number: int, stamps: dict[int, bytes], positions: dict[int, _Position]) -> str:
        calls = "; ".join(
            f"rank {self._global(r)}: {describe_stamp(stamps[r])}" if r in stamps else self._last(r, positions.get(r))
            for r in range(len(self._ranks.global_ranks))
        )
        before = positions[self.rank].stamp(number - 1)
        return (
            f"the ranks disagree on collective number {number} of this group of {len(self._ranks.global_ranks)}: "
            f"{calls}. The last call they agreed on: {describe_stamp(before) if before else 'unknown'}. {SAME_CALLS}"
        )

    def _describe(self, positions: dict[int, _Position]) -> str:
        return "; ".join(self._last(r, positions.get(r)) for r in range(len(self._ranks.global_ranks)))

    def _last(self, rank: int, position: _Position | None) -> str:
        if position is None or not position.stamps:
            return f"rank {self._global(rank)}: has not called anything"
        text = describe_stamp(position.stamps[-1])
        return f"rank {self._global(rank)}: last called {text} (number {position.count - 1})"

    def _global(self, rank: int) -> int:
        return self._ranks.global_ranks[rank]
