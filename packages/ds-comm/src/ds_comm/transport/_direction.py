"""One direction of messages between two ranks: what both map, the sender's end (`Outlet`) and the receiver's (`Inlet`).

Vocabulary
  record  says what a block holds: tag, dtype, the message's bytes, which of them. The sender fills records in a ring,
          the receiver takes them out in order, at once.
  block   bytes of one record; a message is one block, or several where it is long. The receiver returns blocks in any
          order, by their offsets in a second ring.
  lend    hand a block to the receiver's caller as a tensor: returned once that tensor's storage is dead.
  spill   copy what nobody has asked for yet to private memory, so that a sender without room can go on.

Layout: five words on lines of their own (HEAD: records published, COLLECTED: returns seen, STALLED: 1 while there is no
room, by the sender; TAKEN: records read, RETURNED: blocks returned, by the receiver), the two rings, then `capacity`
bytes for blocks. Pages are reserved by the sender as it first uses them.

Invariants
  - A record is used again only once it is taken, a block once it is returned.
  - At most half of the blocks' bytes and `_LEASES` blocks are lent, so messages always get through.
  - Nothing here waits. A lease may end in any thread: it is only noted there, and returned at the next `pump`.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from collections import deque
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_comm.transport._control import LINE, fence
from ds_comm.transport._segment import PAGE, NoSpaceError, Segment, round_up

_HEAD, _STALLED, _COLLECTED, _TAKEN, _RETURNED = (line * LINE // 8 for line in range(5))
_RING = 256
_RECORD = struct.Struct("<qqqqqq")
_RECORD_NBYTES = 64
_RECORDS_AT = 5 * LINE
_RETURNS_AT = _RECORDS_AT + _RING * _RECORD_NBYTES
_RETURNS = _RETURNS_AT // 8
BLOCKS_AT = round_up(_RETURNS_AT + _RING * 8, PAGE)
_LEASES = 128
_ALIGNMENT = 64
_RESERVE_NBYTES = 1 << 18

_CODES = {dtype: zlib.crc32(str(dtype).encode()) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in _CODES.items()}


def dtype_code(dtype: torch.dtype) -> int:
    """A number for the dtype, the same in every process."""
    return _CODES[dtype]


def dtype_name(code: int) -> str:
    return _NAMES.get(code, f"dtype {code}")


class Piece:
    """A record as the receiver read it; ``spilled`` holds its bytes once they were copied out."""

    __slots__ = ("code", "nbytes", "offset", "spilled", "start", "tag", "total")

    def __init__(self, tag: int, code: int, total: int, start: int, nbytes: int, offset: int) -> None:
        self.tag, self.code = tag, code
        self.total, self.start, self.nbytes, self.offset = total, start, nbytes, offset
        self.spilled: Tensor | None = None


class Taker(Protocol):
    """A receive that waits for pieces."""

    finished: bool

    def take(self, piece: Piece) -> None: ...


class Outlet:
    """The sender's end. ``at``: where the direction begins in the segment."""

    def __init__(self, segment: Segment, at: int, capacity: int) -> None:
        self.capacity = capacity
        self._segment = segment
        self._at = at
        self._reserved = 0
        segment.reserve(at, at + BLOCKS_AT)
        self._raw = segment.raw(at, BLOCKS_AT)
        self._words = segment.words(at, BLOCKS_AT)
        self.memory = segment.tensor(at + BLOCKS_AT, (capacity,), torch.uint8)
        self.array = self.memory.numpy()
        self._head = 0
        self._open = 0  # blocks allocated and not yet published
        self._collected = 0
        self._used: dict[int, int] = {}  # offset -> bytes
        self._free: dict[int, list[int]] = {}  # bytes -> offsets, all below `_top`
        self._top = 0

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a new block in ``memory``, to be published; None while there is no room for it.

        NoSpaceError where the host has no shared memory left and nothing is under way that would give some back.
        """
        self._collect()
        if self._head + self._open - self._words[_TAKEN] >= _RING:
            return None
        need = round_up(nbytes, _ALIGNMENT if nbytes <= PAGE else PAGE) or _ALIGNMENT
        spare = self._free.get(need)
        if spare:
            offset = spare.pop()
        elif self._reserve(self._top + need):
            offset = self._top
            self._top += need
        else:
            found = self._gap(need)
            if found is None:
                return None
            offset = found
        self._used[offset] = need
        self._open += 1
        return offset

    @property
    def num_used(self) -> int:
        """Blocks that the receiver has not returned."""
        return len(self._used)

    def keeps_up(self, num: int, seconds: float) -> bool:
        """Whether no more than ``num`` blocks are in use, after waiting for that for so long."""
        deadline = 0.0
        while True:
            self._collect()
            if len(self._used) <= num:
                return True
            now = perf_counter()
            deadline = deadline or now + seconds
            if now > deadline:
                return False
            os.sched_yield()

    def publish(self, tag: int, code: int, total: int, start: int, nbytes: int, offset: int) -> None:
        """Let the receiver see the block at ``offset``: ``nbytes`` from byte ``start`` of a message of ``total``."""
        number = self._head
        at = _RECORDS_AT + number % _RING * _RECORD_NBYTES
        _RECORD.pack_into(self._raw, at, tag, code, total, start, nbytes, offset)
        self._open -= 1
        self._head = number + 1
        fence()
        self._words[_HEAD] = number + 1

    def stall(self, stalled: bool) -> None:
        self._words[_STALLED] = stalled

    def close(self) -> None:
        self._words.release()
        self._raw.release()

    def _collect(self) -> None:
        """Take back the blocks that were returned."""
        words, first = self._words, self._collected
        returned = words[_RETURNED]
        if returned == first:
            return
        fence()
        for number in range(first, returned):
            offset = words[_RETURNS + number % _RING]
            self._free.setdefault(self._used.pop(offset), []).append(offset)
        self._collected = returned
        fence()
        words[_COLLECTED] = returned

    def _gap(self, need: int) -> int | None:
        """First fit between the blocks in use, where no spare block fits and the end is reached."""
        self._free.clear()
        at = 0
        for offset in sorted(self._used):
            if offset - at >= need:
                return at
            at = offset + self._used[offset]
        self._top = at
        if not self._reserve(at + need):
            return None
        self._top += need
        return at

    def _reserve(self, stop: int) -> bool:
        """Whether blocks may reach to ``stop``."""
        if stop <= self._reserved:
            return True
        if stop > self.capacity:
            return False
        start = self._at + BLOCKS_AT
        target = min(self.capacity, round_up(stop, _RESERVE_NBYTES))
        try:
            self._segment.reserve(start + self._reserved, start + target)
        except NoSpaceError:
            if not self._reserved:
                raise
            self.capacity = self._reserved
            return False
        self._reserved = target
        return True


class Inlet:
    """The receiver's end."""

    def __init__(self, segment: Segment, at: int, capacity: int) -> None:
        self._raw = segment.raw(at, BLOCKS_AT)
        self._words = segment.words(at, BLOCKS_AT)
        self._array = segment.tensor(at + BLOCKS_AT, (capacity,), torch.uint8).numpy()
        self._capacity = capacity
        self._seen = 0
        self._waiting: dict[int, deque[Taker]] = {}
        self._arrived: dict[int, deque[Piece]] = {}
        self._leases: dict[int, tuple[weakref.ref[object], int]] = {}
        self._ended: deque[int] = deque()
        self._lent = 0
        self._backlog: deque[int] = deque()  # blocks to be returned, for which the ring has had no room
        self._returned = 0

    def pump(self) -> None:
        """Hand what has arrived to those who wait for it, in order; keep the rest."""
        while self._ended:
            offset = self._ended.popleft()
            self._lent -= self._leases.pop(offset)[1]
            self._return(offset)
        if self._backlog:
            self._return(self._backlog.popleft())
        words, seen = self._words, self._seen
        head = words[_HEAD]
        if head == seen:
            return
        fence()
        pieces = [
            Piece(*_RECORD.unpack_from(self._raw, _RECORDS_AT + number % _RING * _RECORD_NBYTES))
            for number in range(seen, head)
        ]
        self._seen = head
        fence()
        words[_TAKEN] = head
        for piece in pieces:
            queue = self._waiting.get(piece.tag)
            if queue:
                taker = queue[0]
                taker.take(piece)
                if taker.finished:
                    queue.popleft()
            else:
                self._arrived.setdefault(piece.tag, deque()).append(piece)

    def expect(self, tag: int, taker: Taker) -> None:
        """Give the tag's next message to ``taker``, after those who asked for it before."""
        queue = self._waiting.get(tag)
        arrived = self._arrived.get(tag)
        if arrived and not queue:
            while arrived and not taker.finished:
                taker.take(arrived.popleft())
            if taker.finished:
                return
        if queue is None:
            queue = self._waiting[tag] = deque()
        queue.append(taker)

    def has(self, tag: int) -> bool:
        """Whether a message of the tag has begun to arrive that nobody has asked for."""
        return bool(self._arrived.get(tag))

    def spill(self) -> None:
        """If the sender has no room: copy out what nobody has asked for."""
        if not self._words[_STALLED]:
            return
        for pieces in self._arrived.values():
            for piece in pieces:
                if piece.spilled is None:
                    piece.spilled = torch.from_numpy(self._array[piece.offset : piece.offset + piece.nbytes].copy())
                    self._return(piece.offset)

    def copy(self, piece: Piece, target: Any) -> None:
        """The piece's bytes into ``target`` (a numpy array, uint8 [nbytes]); its block goes back."""
        if piece.spilled is not None:
            target[:] = piece.spilled.numpy()
            return
        target[:] = self._array[piece.offset : piece.offset + piece.nbytes]
        self._return(piece.offset)

    def lend(self, piece: Piece) -> Tensor | None:
        """The piece as a tensor (uint8 [nbytes]) in shared memory; None where that much is lent already."""
        if piece.spilled is not None:
            return piece.spilled
        offset, nbytes = piece.offset, piece.nbytes
        if self._lent + nbytes > self._capacity // 2 or len(self._leases) >= _LEASES:
            return None
        array = self._array[offset : offset + nbytes]
        ended = self._ended
        self._leases[offset] = (weakref.ref(array, lambda _: ended.append(offset)), nbytes)
        self._lent += nbytes
        return torch.from_numpy(array)  # its storage keeps `array` alive, and `array` alone ends the lease

    def close(self) -> None:
        self._words.release()
        self._raw.release()

    def _return(self, offset: int) -> None:
        """Give a block back; kept for later where the sender has not collected a ring of them."""
        self._backlog.append(offset)
        words, first = self._words, self._returned
        room = _RING - (first - words[_COLLECTED])
        while room and self._backlog:
            words[_RETURNS + self._returned % _RING] = self._backlog.popleft()
            self._returned += 1
            room -= 1
        if self._returned != first:
            fence()
            words[_RETURNED] = self._returned
