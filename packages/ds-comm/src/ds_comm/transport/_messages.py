"""Messages between two ranks of a shm group: sends, receives, and the waits that keep both going.

Vocabulary
  deferred  a send for which there is no room yet: what is left of it goes as the receiver makes room.
  packet    bytes that their sender writes in place, in shared memory, and their receiver may read there.

Invariants
  - Messages of one tag between two ranks arrive in the order of their sends. A receive may be posted before its send.
  - A send never waits: up to `capacity` bytes per direction are under way at once, what is beyond that is deferred
    and moves whenever this rank starts or polls a message, or waits for anything on shm, in whatever group. So does
    what this rank receives, so two ranks that send each other any amount before they receive do not lock.
  - Ends that differ in size or dtype make every rank of the group raise DivergenceError; a wait for a rank that is gone
    or silent ends as all waits of the control block do.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_comm.errors import CommArgumentError, CommError, DivergenceError
from ds_comm.transport._direction import BLOCKS_AT, Inlet, Outlet, Piece, dtype_code, dtype_name
from ds_comm.transport._segment import PAGE, NoSpaceError, Segment, round_up
from ds_comm.transport.base import DONE, Messenger, Packet, Receipt, Work

if TYPE_CHECKING:
    from ds_comm.ledger import Entry
    from ds_comm.transport._control import Control

_LIMIT = "DS_COMM_MESSAGE_LIMIT"
_CAPACITY_NBYTES = 256 << 20
_CAPACITY_OF_ALL = 16 << 30  # address space, not memory: pages have memory from their first use on
_PIECE_NBYTES = 512 << 10
"""Long messages go in pieces of this size: one is copied out, still in the cache, while the next is written."""

_PACE_PIECES = 2
_PACE_SECONDS = 100e-6
"""So many pieces ahead, a long send waits this long for the receiver, whose blocks are in the cache, before it takes
others; a receiver that does not come meanwhile is not waited for again."""

_LEAST_CAPACITY = 64 << 10
_POLLS_TO_SPILL = 64
_TENSORS = 64
_BYTE = dtype_code(torch.uint8)


def message_limit() -> int | None:
    """``DS_COMM_MESSAGE_LIMIT``, or None where it is not set; CommArgumentError where it is no sensible number."""
    text = os.environ.get(_LIMIT)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < _LEAST_CAPACITY:
        raise CommArgumentError(f"{_LIMIT}={text!r}: expected a number of bytes, at least {_LEAST_CAPACITY}")
    return int(text)


def plan_capacity(size: int, limit: int | None, shared_limit: int | None) -> int:
    """Bytes that may be under way from one rank to another in a group of ``size``; 0: no messages through memory.

    limit: the wish of the environment. shared_limit: the bytes of shared memory that the group may use, of which
    messages take at most a quarter.
    """
    directions = size * (size - 1)
    capacity = limit or max(1 << 20, min(_CAPACITY_NBYTES, _CAPACITY_OF_ALL // directions))
    if shared_limit is not None:
        capacity = min(capacity, shared_limit // 4 // directions - BLOCKS_AT)
    return 0 if capacity < _LEAST_CAPACITY else round_up(capacity, PAGE)


def area_nbytes(size: int, capacity: int) -> int:
    """Bytes of address space that the messages of a group take in its segment."""
    return size * size * (BLOCKS_AT + capacity) if capacity else 0


class Messages(Messenger):
    """This rank's ends of the directions from and to every peer, made when first used. ``at``: where they begin."""

    def __init__(self, control: Control, segment: Segment, at: int, capacity: int) -> None:
        self._control = control
        self._segment = segment
        self._at = at
        self._capacity = capacity
        self._lock = threading.RLock()
        self._outlets: dict[int, Outlet] = {}
        self._inlets: dict[int, Inlet] = {}
        self._deferred: dict[int, deque[SendWork]] = {}
        self._tensors: dict[tuple[int, int, int], Tensor] = {}
        self._closed = False

    def isend(self, tensor: Tensor, dst: int, tag: int, entry: Entry) -> Work:
        """Send ``tensor`` (CPU, strided); it must stay as it is until the Work's ``wait``."""
        self._check()
        return self._send(SendWork(self, _flat(tensor), dst, tag, dtype_code(tensor.dtype), entry))

    def irecv(self, tensor: Tensor, src: int, tag: int, entry: Entry) -> Work:
        """Receive into ``tensor`` (CPU, strided), in place."""
        self._check()
        return self._expect(ReceiveWork(self, src, tag, dtype_code(tensor.dtype), entry, tensor))

    def packet(self, nbytes: int, dst: int, tag: int, entry: Entry) -> Packet:
        """Bytes to be written and then sent, which must happen: in shared memory where there is room."""
        self._check()
        with self._lock:
            offset = None
            if nbytes <= self._capacity // 4 and not self._deferred.get(dst):
                offset = self._allocate(dst, nbytes, entry)
            if offset is not None:
                return ShmPacket(self, self._at_block(dst, offset, nbytes), offset, dst, tag, entry)
        return ShmPacket(self, torch.empty(nbytes, dtype=torch.uint8), None, dst, tag, entry)

    def receive(self, nbytes: int, src: int, tag: int, entry: Entry) -> Receipt:
        """Receive a packet; the tensor may lie in shared memory, which goes back to the sender when it is dead."""
        self._check()
        receipt = ReceiveWork(self, src, tag, _BYTE, entry, None, nbytes)
        self._expect(receipt)
        return receipt

    def probe(self, tag: int, entry: Entry) -> int:
        """Wait until some rank's message of this tag is there that nobody has asked for; returns the rank."""
        found: list[int] = []

        def look() -> bool:
            with self._lock:
                self._advance()
                found[:] = [peer for peer, inlet in self._inlets.items() if inlet.has(tag)]
            return bool(found)

        for peer in range(self._control.size):
            if peer != self._control.rank:
                self._inlet(peer)
        self._control.await_peer(None, look, entry.describe)
        return found[0]

    def close(self) -> None:
        self._closed = True
        self._control.meanwhile(self._move, False)
        for outlet in self._outlets.values():
            outlet.close()
        for inlet in self._inlets.values():
            inlet.close()
        self._outlets, self._inlets, self._tensors = {}, {}, {}

    # ---- what the works call

    def poll(self, work: SendWork | ReceiveWork) -> bool:
        """Move what can be moved; whether ``work`` is finished."""
        with self._lock:
            if not work.finished:
                self._advance()
        return work.finished

    def wait(self, work: SendWork | ReceiveWork) -> None:
        """Return when ``work`` is finished."""
        if self.poll(work):
            return
        self._check()
        polls = seen = 0

        def moved() -> bool:
            nonlocal polls
            polls += 1
            if self.poll(work) or work.moved != seen:
                return True
            if polls % _POLLS_TO_SPILL == 0:
                with self._lock:
                    for inlet in self._inlets.values():
                        inlet.spill()
            return False

        entry = work.entry
        with entry.timed():
            while not work.finished:  # anew for every piece, since a wait gets less attentive as it lasts
                seen = work.moved
                self._control.await_peer(work.peer, moved, entry.describe)

    def push(self, work: SendWork) -> None:
        """As many pieces of ``work`` as there is room for."""
        outlet = self._outlet(work.peer, work.entry)
        flat, total = work.flat, work.total
        paced, ahead = total > _PACE_PIECES * _PIECE_NBYTES, outlet.num_used + _PACE_PIECES
        while not work.finished:
            nbytes = min(total - work.moved, _PIECE_NBYTES, outlet.capacity // 4)
            paced = paced and outlet.keeps_up(ahead, _PACE_SECONDS)
            offset = self._allocate(work.peer, nbytes, work.entry)
            if offset is None:  # lent blocks may leave no gap of this size, but always one of this
                nbytes = min(nbytes, outlet.capacity // 512)
                offset = self._allocate(work.peer, nbytes, work.entry) if nbytes else None
                if offset is None:
                    return
            if nbytes:
                outlet.array[offset : offset + nbytes] = flat[work.moved : work.moved + nbytes]
            outlet.publish(work.tag, work.code, total, work.moved, nbytes, offset)
            work.moved += nbytes
            work.finished = work.moved == total
        del work.flat

    def publish(self, packet: ShmPacket) -> Work:
        nbytes = packet.data.numel()
        with self._lock:
            if packet.offset is None:
                return self._send(SendWork(self, packet.data, packet.peer, packet.tag, _BYTE, packet.entry))
            self._outlets[packet.peer].publish(packet.tag, _BYTE, nbytes, 0, nbytes, packet.offset)
        return DONE

    def disagree(self, work: ReceiveWork, piece: Piece) -> None:
        """The two ends of a message differ: every rank raises."""
        ours, theirs = self._control.global_rank(self._control.rank), self._control.global_rank(work.peer)
        self._control.fail(
            DivergenceError(
                f"{work.entry.describe()} (tag {work.tag}): rank {theirs} sends {piece.total} bytes of "
                f"{dtype_name(piece.code)}, rank {ours} expects {work.total} bytes of {dtype_name(work.code)}; both "
                "ends of a message must have the same dtype and number of elements"
            )
        )

    # ---- inside

    def _check(self) -> None:
        if self._closed:
            raise CommError("this communicator is closed; get the group's new one with ds_comm.communicator(group)")
        self._control.raise_failures()

    def _send(self, work: SendWork) -> Work:
        with self._lock:
            queue = self._deferred.setdefault(work.peer, deque())
            if queue:
                self._advance()
            if not queue:
                self.push(work)
            if not work.finished:
                queue.append(work)
                self._control.meanwhile(self._move, True)
                self._outlets[work.peer].stall(True)
        return work

    def _expect(self, work: ReceiveWork) -> Work:
        with self._lock:
            inlet = work.inlet = self._inlet(work.peer)
            inlet.pump()
            inlet.expect(work.tag, work)
        return work

    def _at_block(self, dst: int, offset: int, nbytes: int) -> Tensor:
        """The block as a tensor, the same object as before where there was one: making it costs a small message."""
        key = (dst, offset, nbytes)
        data = self._tensors.get(key)
        if data is None:
            if len(self._tensors) >= _TENSORS:
                self._tensors.clear()
            data = self._tensors[key] = self._outlets[dst].memory[offset : offset + nbytes]
        return data

    def _move(self) -> None:
        """What any wait of this process does while sends are deferred."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._closed:
                self._advance()
            if not any(self._deferred.values()):
                self._control.meanwhile(self._move, False)
        finally:
            self._lock.release()

    def _advance(self) -> None:
        for inlet in self._inlets.values():
            inlet.pump()
        for peer, queue in self._deferred.items():
            if queue:
                while queue:
                    self.push(queue[0])
                    if not queue[0].finished:
                        break
                    queue.popleft()
                else:
                    self._outlets[peer].stall(False)

    def _allocate(self, peer: int, nbytes: int, entry: Entry) -> int | None:
        try:
            return self._outlet(peer, entry).allocate(nbytes)
        except NoSpaceError as error:
            self._control.fail(
                CommError(f"{entry.describe()}: {error}; enlarge /dev/shm, or set DS_COMM_TRANSPORT=gloo")
            )
            raise

    def _outlet(self, peer: int, entry: Entry) -> Outlet:
        outlet = self._outlets.get(peer)
        if outlet is None:
            try:
                outlet = Outlet(self._segment, self._where(self._control.rank, peer), self._capacity)
            except NoSpaceError as error:
                self._control.fail(CommError(f"{entry.describe()}: {error}; enlarge /dev/shm"))
                raise
            self._outlets[peer] = outlet
        return outlet

    def _inlet(self, peer: int) -> Inlet:
        inlet = self._inlets.get(peer)
        if inlet is None:
            inlet = self._inlets[peer] = Inlet(self._segment, self._where(peer, self._control.rank), self._capacity)
        return inlet

    def _where(self, src: int, dst: int) -> int:
        return self._at + (src * self._control.size + dst) * (BLOCKS_AT + self._capacity)


class SendWork(Work):
    """A send: finished once the receiver can do without this rank's tensor."""

    def __init__(self, messages: Messages, flat: Tensor, peer: int, tag: int, code: int, entry: Entry) -> None:
        self._messages = messages
        self.flat = flat.numpy()
        self.total = flat.numel()
        self.peer, self.tag, self.code, self.entry = peer, tag, code, entry
        self.moved = 0

    def wait(self) -> None:
        if not self.finished:
            self._messages.wait(self)

    def is_completed(self) -> bool:
        return self.finished or self._messages.poll(self)


class ReceiveWork(Receipt):
    """A receive, into ``target`` or (None) as a packet of ``nbytes``."""

    inlet: Inlet

    def __init__(
        self, messages: Messages, peer: int, tag: int, code: int, entry: Entry, target: Tensor | None, nbytes: int = 0
    ) -> None:
        self._messages = messages
        self.peer, self.tag, self.code, self.entry = peer, tag, code, entry
        self.total = nbytes if target is None else target.numel() * target.itemsize
        self._target = target
        self._into: Tensor | None = None
        self._array: Any = None  # the same bytes for numpy, which copies bytes faster than torch
        self.moved = 0

    def take(self, piece: Piece) -> None:
        if piece.total != self.total or piece.code != self.code:
            self._messages.disagree(self, piece)
        if self._into is None:
            if self._target is None and piece.nbytes == self.total and (lent := self.inlet.lend(piece)) is not None:
                self.data = lent
                self.finished = True
                return
            self._into = self._prepare()
            self._array = self._into.numpy()
        self.inlet.copy(piece, self._array[piece.start : piece.start + piece.nbytes])
        self.moved += piece.nbytes
        if self.moved == self.total:
            self._complete(self._into)

    def wait(self) -> None:
        if not self.finished:
            self._messages.wait(self)

    def is_completed(self) -> bool:
        return self.finished or self._messages.poll(self)

    def _prepare(self) -> Tensor:
        """Where the bytes go: the target itself if they can lie there as they are."""
        target = self._target
        if target is not None and target.is_contiguous() and not target.is_conj() and not target.is_neg():
            return target.detach().view(-1).view(torch.uint8)
        return torch.empty(self.total, dtype=torch.uint8)

    def _complete(self, into: Tensor) -> None:
        target = self._target
        if target is None:
            self.data = into
        elif into.data_ptr() != target.data_ptr():
            target.detach().copy_(into.view(target.dtype).view(target.shape))
        self._target = self._into = self._array = None
        self.finished = True


class ShmPacket(Packet):
    """``offset``: the block it lies in; None where it is private memory that is sent as any tensor."""

    __slots__ = ("_messages", "data", "entry", "lasting", "offset", "peer", "tag")

    def __init__(self, messages: Messages, data: Tensor, offset: int | None, peer: int, tag: int, entry: Entry) -> None:
        self.data = data
        self.lasting = offset is not None
        self._messages = messages
        self.offset, self.peer, self.tag, self.entry = offset, peer, tag, entry

    def send(self) -> Work:
        return self._messages.publish(self)


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in order of its elements."""
    flat = tensor.detach()
    if flat.is_conj() or flat.is_neg():
        flat = flat.resolve_conj().resolve_neg()
    return flat.contiguous().view(-1).view(torch.uint8)
