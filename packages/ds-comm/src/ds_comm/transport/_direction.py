"""One direction of messages between two ranks: what both map, the sender's end (`Outlet`) and the receiver's (`Inlet`).

Vocabulary
  record  says what a block holds: tag, dtype, the message's bytes, which of them. The sender numbers and fills records
          in a ring; the receiver reads them in order and acknowledges each by writing its number.
  block   bytes of one record; a message is one block, or several where it is long.
  lend    hand a block to the receiver's caller as a tensor: acknowledged once that tensor's storage is dead.
  spill   copy what nobody has asked for yet to private memory, so that a sender without room can go on.

Layout: two words on lines of their own (HEAD: records published; STALLED: 1 while the sender has no room), the ring,
then `capacity` bytes for blocks. Pages are reserved by the sender as it first uses them.

Invariants
  - A record is read only below HEAD; a record and its block are used again only when acknowledged.
  - At most half of the blocks' bytes and half of the records are lent, so messages always get through.
  - Nothing here waits. A lease may end in any thread: it is only noted there, and acknowledged at the next `pump`.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_comm.transport._control import LINE, fence
from ds_comm.transport._segment import PAGE, NoSpaceError, Segment, round_up

_RING = 256
_RECORD = struct.Struct("<qqqqqq")
_DONE = LINE // 2
_RECORDS_AT = 2 * LINE
BLOCKS_AT = round_up(_RECORDS_AT + _RING * LINE, PAGE)
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

    __slots__ = ("code", "nbytes", "number", "offset", "spilled", "start", "tag", "total")

    def __init__(self, number: int, tag: int, code: int, total: int, start: int, nbytes: int, offset: int) -> None:
        self.number, self.tag, self.code = number, tag, code
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
        self._used: dict[int, int] = {}  # offset -> bytes
        self._unacknowledged: dict[int, int] = {}  # number -> offset, in order
        self._free: dict[int, list[int]] = {}  # bytes -> offsets, all below `_top`
        self._top = 0

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a new block in ``memory``, to be published; None while there is no room for it.

        NoSpaceError where the host has no shared memory left and nothing is under way that would give some back.
        """
        if self._unacknowledged:
            self._reclaim(8)
            if self._ring_is_full():
                self._reclaim(_RING)
                if self._ring_is_full():
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

    def keeps_up(self, num: int, seconds: float) -> bool:
        """Whether at most ``num`` blocks are unacknowledged, after waiting for that for so long; takes them back."""
        deadline = 0.0
        while True:
            self._reclaim(_RING)
            if len(self._unacknowledged) <= num:
                return True
            now = perf_counter()
            deadline = deadline or now + seconds
            if now > deadline:
                return False
            os.sched_yield()

    def publish(self, tag: int, code: int, total: int, start: int, nbytes: int, offset: int) -> None:
        """Let the receiver see the block at ``offset``: ``nbytes`` from byte ``start`` of a message of ``total``."""
        number = self._head
        _RECORD.pack_into(self._raw, _RECORDS_AT + number % _RING * LINE, tag, code, total, start, nbytes, offset)
        self._unacknowledged[number] = offset
        self._open -= 1
        self._head = number + 1
        fence()
        self._words[0] = number + 1

    def stall(self, stalled: bool) -> None:
        self._words[LINE // 8] = stalled

    def close(self) -> None:
        self._words.release()
        self._raw.release()

    def _ring_is_full(self) -> bool:
        oldest = next(iter(self._unacknowledged), self._head)
        return self._head + self._open - oldest >= _RING

    def _reclaim(self, limit: int) -> None:
        """Take back the blocks of acknowledged records, among the oldest ``limit``."""
        words = self._words
        for number in list(islice(self._unacknowledged, limit)):
            if words[(_RECORDS_AT + number % _RING * LINE + _DONE) // 8] == number + 1:
                offset = self._unacknowledged.pop(number)
                self._free.setdefault(self._used.pop(offset), []).append(offset)
        fence()

    def _gap(self, need: int) -> int | None:
        """First fit between the blocks in use, where no spare block fits and the end is reached."""
        self._reclaim(_RING)
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
        if stop > self.capacity:
            return False
        if stop > self._reserved:
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

    def pump(self) -> None:
        """Hand what has arrived to those who wait for it, in order; keep the rest."""
        while self._ended:
            number = self._ended.popleft()
            self._lent -= self._leases.pop(number)[1]
            self._acknowledge(number)
        head = self._words[0]
        if head == self._seen:
            return
        fence()
        while self._seen < head:
            number = self._seen
            self._seen = number + 1
            piece = Piece(number, *_RECORD.unpack_from(self._raw, _RECORDS_AT + number % _RING * LINE))
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
        queue = self._waiting.setdefault(tag, deque())
        arrived = self._arrived.get(tag)
        if not queue and arrived:
            while arrived and not taker.finished:
                taker.take(arrived.popleft())
        if not taker.finished:
            queue.append(taker)

    def has(self, tag: int) -> bool:
        """Whether a message of the tag has begun to arrive that nobody has asked for."""
        return bool(self._arrived.get(tag))

    def spill(self) -> None:
        """If the sender has no room: copy out what nobody has asked for."""
        if not self._words[LINE // 8]:
            return
        for pieces in self._arrived.values():
            for piece in pieces:
                if piece.spilled is None:
                    piece.spilled = torch.from_numpy(self._array[piece.offset : piece.offset + piece.nbytes].copy())
                    self._acknowledge(piece.number)

    def copy(self, piece: Piece, target: Any) -> None:
        """The piece's bytes into ``target`` (a numpy array, uint8 [nbytes]); its block goes back."""
        if piece.spilled is not None:
            target[:] = piece.spilled.numpy()
            return
        target[:] = self._array[piece.offset : piece.offset + piece.nbytes]
        self._acknowledge(piece.number)

    def lend(self, piece: Piece) -> Tensor | None:
        """The piece as a tensor (uint8 [nbytes]) in shared memory; None where that much is lent already."""
        if piece.spilled is not None:
            return piece.spilled
        if self._lent + piece.nbytes > self._capacity // 2 or len(self._leases) >= _RING // 2:
            return None
        array = self._array[piece.offset : piece.offset + piece.nbytes]
        tensor = torch.from_numpy(array)  # its storage keeps `array` alive, and `array` alone ends the lease
        self._leases[piece.number] = (weakref.ref(array, self._note(piece.number)), piece.nbytes)
        self._lent += piece.nbytes
        return tensor

    def close(self) -> None:
        self._words.release()
        self._raw.release()

    def _note(self, number: int) -> Callable[[object], None]:
        ended = self._ended
        return lambda _: ended.append(number)

    def _acknowledge(self, number: int) -> None:
        fence()
        self._words[(_RECORDS_AT + number % _RING * LINE + _DONE) // 8] = number + 1
