"""The control block of a shm group: one small shared segment through which the ranks meet, compare and warn.

Layout, per rank (each rank writes only its own rows): six 64-bit words, each on a cache line of its own, then two
mailboxes, one failure message and a ring of stamps.
  POSITION  number of stamps posted          MEETINGS  number of meetings reached
  LEFT      1 once the rank has gone         FAILED    0, or 1 + index of the error class of its failure message

Vocabulary
  post      write the next stamp into the own ring. Never waits, unless a peer is a whole ring behind.
  meet      raise the own MEETINGS word and wait until every peer's is as high.
  compare   hold the own stamps against every peer's at the same number: done at every wait, before its data is used.

Invariants
  - A rank that raises writes why first; a rank that waits reads that, so all ranks raise the same text.
  - No wait is unbounded: a dead process, a rank that left, other stamps, or the watchdog end it.
  - A stamp is overwritten only after this rank has compared it with every peer's; a peer that finds it overwritten may
    therefore take it as equal.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ds_comm.errors import CommError, DivergenceError, RankMissingError
from ds_comm.ledger import STAMP_TEXT_NBYTES, describe_stamp
from ds_comm.transport._segment import PAGE, Segment, round_up
from ds_comm.watchdog import SAME_CALLS, Patience, Peer, Watchdog

LINE = 128
"""Bytes between words of different ranks: two cache lines, since prefetchers fetch pairs."""

_WORDS = 6
_POSITION, _MEETINGS, _LEFT, _FAILED = range(4)
_MAIL_NBYTES = 16384
_MESSAGE_NBYTES = 8192
_RING = 512
_RECORD = struct.Struct(f"<qq{STAMP_TEXT_NBYTES}s8x")
_MAIL_AT = _WORDS * LINE
_MESSAGE_AT = _MAIL_AT + 2 * _MAIL_NBYTES
_RING_AT = _MESSAGE_AT + _MESSAGE_NBYTES
ROW_NBYTES = round_up(_RING_AT + _RING * _RECORD.size, PAGE)
_ERRORS: tuple[type[CommError], ...] = (CommError, DivergenceError, RankMissingError)
_HEADER = struct.Struct("<q")

_SPIN_SECONDS = 100e-6
_FIRST_SLEEP = 20e-6
_LAST_SLEEP = 500e-6
_PEER_CHECK_SECONDS = 5e-3


What = str | Callable[[], str]
"""Names the call that waits, for errors; a function where making the text would cost."""

_fence_lock = threading.Lock()


def fence() -> None:
    """Order memory accesses before it against those after it, as seen by the other processes.

    Python has no fence. Taking and releasing a lock contains the processor's acquire and release; doing it twice puts
    a release before an acquire, which nothing may cross in either direction on any architecture we know. On x86, whose
    stores are ordered anyway, one would do.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass


@dataclass(frozen=True)
class Members:
    """Who the ranks of the group are: position i is group rank i."""

    global_ranks: tuple[int, ...]
    pids: tuple[int, ...]


class Control:
    """One rank's hold on the control block of its group."""

    def __init__(self, segment: Segment, rank: int, members: Members, watchdog: Watchdog) -> None:
        self.rank = rank
        self.size = len(members.pids)
        self._members = members
        self._watchdog = watchdog
        self._raw = segment.raw(0, self.size * ROW_NBYTES)
        self._words = segment.words(0, self.size * ROW_NBYTES)
        self._peers = {r: Peer(pid) for r, pid in enumerate(members.pids) if r != rank}
        self._compared = dict.fromkeys(self._peers, 0)
        self._position = 0
        self._meetings = 0
        self._exchanges = 0
        self._failure: CommError | None = None
        self._meeting_words = [self._word(r, _MEETINGS) for r in range(self.size)]
        self._position_words = [self._word(r, _POSITION) for r in range(self.size)]
        self._failed_words = [self._word(r, _FAILED) for r in range(self.size)]

    # ---- stamps

    def post(self, stamp: bytes) -> None:
        """Number and publish this rank's next call."""
        self.raise_failures()
        number = self._position
        if number - min(self._compared.values()) >= _RING:
            self._make_room(number, stamp)
        slot = self.rank * ROW_NBYTES + _RING_AT + (number % _RING) * _RECORD.size
        _RECORD.pack_into(self._raw, slot, number, 0, stamp)
        self._position = number + 1
        fence()
        self._words[self._position_words[self.rank]] = number + 1

    def _make_room(self, number: int, stamp: bytes) -> None:
        """The slowest peer is a ring of stamps behind: wait until its stamps are there to compare."""
        self.compare()
        if number - min(self._compared.values()) >= _RING:
            what = f"{describe_stamp(stamp)} (call {number})"
            self.await_words(self._words, self._position_words, number - _RING + 1, what)

    def compare(self) -> None:
        """Raise DivergenceError, on every rank, at the first number where a peer's stamp is not ours."""
        for peer in self._compared:
            start, stop = self._compared[peer], min(self._position, self._words[self._position_words[peer]])
            if start >= stop:
                continue
            fence()
            first = start  # runs of the ring without a wrap are compared as one piece of memory
            while first < stop and self._run(self.rank, first, stop) == self._run(peer, first, stop):
                first = min(stop, (first // _RING + 1) * _RING)
            for number in range(first, stop):
                ours, theirs = self._record(self.rank, number), self._record(peer, number)
                if ours != theirs and self._words[self._position_words[peer]] < number + _RING:
                    self.fail(DivergenceError(self._describe_divergence(number)))
            self._compared[peer] = stop

    def _record(self, rank: int, number: int) -> bytes:
        slot = rank * ROW_NBYTES + _RING_AT + (number % _RING) * _RECORD.size
        return bytes(self._raw[slot : slot + _RECORD.size])

    def _run(self, rank: int, first: int, stop: int) -> bytes:
        """The records from ``first`` to ``stop`` or the end of the ring, whichever comes first."""
        slot = rank * ROW_NBYTES + _RING_AT + (first % _RING) * _RECORD.size
        return bytes(self._raw[slot : slot + min(stop - first, _RING - first % _RING) * _RECORD.size])

    def _stamp_text(self, rank: int, number: int) -> str | None:
        """What ``rank`` called as its call ``number``, or None if it has not come there or it is forgotten."""
        if not 0 <= number < self._words[self._position_words[rank]]:
            return None
        found, _, text = _RECORD.unpack(self._record(rank, number))
        return describe_stamp(text) if found == number else None

    def _describe_divergence(self, number: int) -> str:
        lines = []
        for rank in range(self.size):
            text = self._stamp_text(rank, number)
            lines.append(f"rank {self.global_rank(rank)}: {text}" if text else self._last_call(rank))
        before = self._stamp_text(self.rank, number - 1)
        return (
            f"the ranks disagree on collective number {number} of this group of {self.size}: {'; '.join(lines)}. "
            f"The last call they agreed on: {before or 'none'}. {SAME_CALLS}"
        )

    def _last_call(self, rank: int) -> str:
        number = self._words[self._position_words[rank]]
        text = self._stamp_text(rank, number - 1)
        return (
            f"rank {self.global_rank(rank)}: last called {text} (number {number - 1})"
            if text
            else (f"rank {self.global_rank(rank)}: has not called anything")
        )

    # ---- meeting and exchanging

    def meet(self, what: What, limit: float | None = None) -> None:
        """Return when every rank has come here. limit: seconds instead of the watchdog's."""
        self._meetings += 1
        fence()
        self._words[self._meeting_words[self.rank]] = self._meetings
        self.await_words(self._words, self._meeting_words, self._meetings, what, limit)

    def exchange(self, payload: bytes, what: What) -> list[bytes]:
        """Every rank's payload, in rank order. One meeting.

        The two mailboxes alternate: writing one again means that all ranks have come to the exchange in between, so
        none still reads it.
        """
        if len(payload) > _MAIL_NBYTES - _HEADER.size:
            raise CommError(f"{what}: a payload of {len(payload)} bytes does not fit a mailbox of {_MAIL_NBYTES}")
        side = _MAIL_AT + (self._exchanges % 2) * _MAIL_NBYTES
        self._exchanges += 1
        start = self.rank * ROW_NBYTES + side
        _HEADER.pack_into(self._raw, start, len(payload))
        self._raw[start + _HEADER.size : start + _HEADER.size + len(payload)] = payload
        self.meet(what)
        replies = []
        for rank in range(self.size):
            start = rank * ROW_NBYTES + side
            (length,) = _HEADER.unpack_from(self._raw, start)
            replies.append(bytes(self._raw[start + _HEADER.size : start + _HEADER.size + length]))
        return replies

    # ---- waiting

    def await_words(
        self, words: memoryview, where: Sequence[int], target: int, what: What, limit: float | None = None
    ) -> None:
        """Return when ``words[where[r]] >= target`` for every rank r, and the stamps agree."""
        self._await(lambda: [r for r in self._peers if words[where[r]] < target], what, limit)
        fence()
        self.compare()

    def await_peer(self, peer: int | None, done: Callable[[], bool], what: What) -> None:
        """Return when ``done()``, which ``peer`` may still have to act for (None: some peer, until all have gone)."""

        def pending() -> list[int]:
            if done():
                return []
            if peer is not None:
                return [peer]
            left = [r for r, p in self._peers.items() if not self._words[self._word(r, _LEFT)] and not p.gone()]
            return left or list(self._peers)

        self._await(pending, what, None)

    def await_condition(self, done: Callable[[], bool], what: What, limit: float | None = None) -> None:
        """Return when ``done()``, which any peer may still have to act for."""
        self._await(lambda: [] if done() else list(self._peers), what, limit)

    def _await(self, pending: Callable[[], list[int]], what: What, limit: float | None) -> None:
        """Wait until no rank is pending: look, spin for as long as a meeting usually takes, then sleep in turns."""
        if not pending():
            return
        deadline = time.perf_counter() + _SPIN_SECONDS
        while time.perf_counter() < deadline:
            os.sched_yield()
            if not pending():
                return
        watchdog = self._watchdog if limit is None else Watchdog(limit)
        patience = Patience(watchdog, what if isinstance(what, str) else what())
        pause, next_check = _FIRST_SLEEP, 0.0
        while pending():
            self.raise_failures()
            self.compare()
            for move in tuple(self._watchdog.meanwhile):
                move()
            if patience.waited >= next_check:
                next_check = patience.waited + _PEER_CHECK_SECONDS
                self._check_peers(pending, patience)
            time.sleep(pause)
            pause = min(pause * 1.3, _LAST_SLEEP)

    def meanwhile(self, move: Callable[[], None], wanted: bool) -> None:
        """Have every wait of this process, of whatever group, call `move` again and again, or no more."""
        (self._watchdog.meanwhile.add if wanted else self._watchdog.meanwhile.discard)(move)

    def _check_peers(self, pending: Callable[[], list[int]], patience: Patience) -> None:
        """Raise if a rank we wait for will not come. A rank may go right after it came, so ask again."""
        for rank in pending():
            left = self._words[self._word(rank, _LEFT)] != 0
            if (left or self._peers[rank].gone()) and rank in pending():
                self.raise_failures()
                fate = "has left the group" if left else "has died"
                fate = f"rank {self.global_rank(rank)} {fate} (process {self._members.pids[rank]})"
                self._missing([rank], fate, patience)
        if patience.exhausted and (late := pending()):
            names = ", ".join(str(self.global_rank(r)) for r in late)
            fate = f"rank {names} did not come within {patience.limit:g} s (ds_comm.set_watchdog)"
            self._missing(late, fate, patience)
        patience.notice(lambda: "; ".join(self._last_call(r) for r in pending()))

    def _missing(self, pending: Sequence[int], fate: str, patience: Patience) -> None:
        others = [r for r in range(self.size) if r not in pending]
        calls = "; ".join(self._last_call(r) for r in [*pending, *others])
        self.fail(RankMissingError(f"{patience.what}: {fate}. {calls}"))

    def explain(self, error: RuntimeError, what: str) -> NoReturn:
        """Raise what lies behind a failed torch operation: a peer's death where one is found within a second."""
        patience = Patience(self._watchdog, what)
        while patience.waited < 1.0:
            self.raise_failures()
            self._check_peers(lambda: list(self._peers), patience)
            time.sleep(_PEER_CHECK_SECONDS)
        raise CommError(f"{what} failed on rank {self.global_rank(self.rank)}: {error}") from error

    # ---- failing

    def fail(self, error: CommError) -> None:
        """Let every rank raise ``error``, and raise it here; unless another rank was first: then its error counts."""
        error = self._first_failure() or error
        if self._failure is None:
            self._failure = error
            text = str(error).encode()[: _MESSAGE_NBYTES - _HEADER.size]
            start = self.rank * ROW_NBYTES + _MESSAGE_AT
            _HEADER.pack_into(self._raw, start, len(text))
            self._raw[start + _HEADER.size : start + _HEADER.size + len(text)] = text
            kind = next(i for i in reversed(range(len(_ERRORS))) if isinstance(error, _ERRORS[i]))
            fence()
            self._words[self._failed_words[self.rank]] = 1 + kind
        raise error

    def raise_failures(self) -> None:
        """Raise what this rank or a peer has found wrong before: the group is not usable any more."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        if (error := self._first_failure()) is not None:
            self.fail(error)

    def _first_failure(self) -> CommError | None:
        """What a rank has written down as wrong, if any has."""
        for rank, where in enumerate(self._failed_words):
            kind = self._words[where]
            if kind:
                fence()
                start = rank * ROW_NBYTES + _MESSAGE_AT
                (length,) = _HEADER.unpack_from(self._raw, start)
                text = bytes(self._raw[start + _HEADER.size : start + _HEADER.size + length])
                return _ERRORS[kind - 1](text.decode(errors="replace"))
        return None

    def close(self) -> None:
        """Say that this rank has left, and let go of the memory."""
        if self._peers:
            fence()
            self._words[self._word(self.rank, _LEFT)] = 1
        for peer in self._peers.values():
            peer.close()
        self._peers = {}
        self._words.release()
        self._raw.release()

    def global_rank(self, rank: int) -> int:
        """The world's number of a rank of this group."""
        return self._members.global_ranks[rank]

    @staticmethod
    def _word(rank: int, which: int) -> int:
        return (rank * ROW_NBYTES + which * LINE) // 8
