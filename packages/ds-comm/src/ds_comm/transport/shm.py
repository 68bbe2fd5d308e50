"""Transport for CPU tensors when all ranks of a group run on one host: everything is a read of shared memory.

Vocabulary
  control   the block through which ranks meet and compare stamps (``_control``).
  segment   a nameless piece of shared memory that every rank maps (``_segment``).
  scratch   one segment for the collectives on ordinary tensors, made at the first of them: two sides per rank, used in
            turn, so that one meeting per chunk is enough (a side is written again two chunks later, and everybody has
            come to the meeting in between only after reading it).

Invariants
  - A gather window is one mapping shared by all: gathering moves nothing and waits for nobody.
  - A reduction reads every rank's contribution where it lies, in rank order, in one pass; results do not depend on who
    came when.
  - If shared memory for a window is not to be had, all ranks agree on that, one log line says so, and the window is
    made by the fallback transport (gloo).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.errors import CommError
from ds_comm.kernels import sum_rows
from ds_comm.ledger import Entry, Ledger
from ds_comm.log import get_logger
from ds_comm.transport._control import LINE, Control, fence
from ds_comm.transport._messages import Messages
from ds_comm.transport._reduce import reduce_rows
from ds_comm.transport._segment import PAGE, Arena, NoSpaceError, Segment, round_up
from ds_comm.transport.base import DONE, Enter, GatherWindow, ReduceWindow, Transport, Work

_SCRATCH_NBYTES = 4 << 20
"""Bytes of one side of one rank's scratch: large enough to hide a meeting, small enough to stay in the cache."""

_logger = get_logger(__name__)


class ShmTransport(Transport):
    """See the module's docstring. ``fallback`` makes the transport for what shared memory cannot hold."""

    kind = "shm"

    def __init__(
        self,
        control: Control,
        *,
        messages: Messages | None,
        ledger: Ledger,
        enter: Enter,
        fallback: Callable[[], Transport],
    ) -> None:
        self.control = control
        self.messages = messages
        self.rank, self.size = control.rank, control.size
        self._ledger = ledger
        self._enter = enter
        self._make_fallback = fallback
        self._fallback: Transport | None = None
        self._arena = Arena()
        self._scratch: Segment | None = None
        self._next_side = 0
        self._scratch_failed = False

    # ---- the plain parts of the interface

    def post(self, stamp: bytes) -> None:
        self.control.post(stamp)

    def meet(self, entry: Entry, limit: float | None = None) -> None:
        self.control.meet(entry.describe, limit)

    def delegate(self, start: Callable[..., dist.Work | None], entry: Entry) -> Work:
        # the ranks meet first: a rank that went another way is found here, not in a wait that nobody watches
        self.meet(entry)
        return super().delegate(start, entry)

    def guard(self, call: Callable[[], None], entry: Entry) -> None:
        self.meet(entry)
        call()

    def block(self, work: dist.Work, entry: Entry, limit: float | None = None) -> None:
        self.control.await_condition(work.is_completed, entry.describe, limit)
        work.wait()

    def block_message(self, work: dist.Work, entry: Entry) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self.control.explain(error, entry.describe())

    def exchange(self, payload: bytes, entry: Entry) -> list[bytes]:
        return self.control.exchange(payload, entry.describe())

    def fail(self, error: Exception) -> None:
        if isinstance(error, CommError):
            self.control.fail(error)
        raise error

    def close(self) -> None:
        if self.messages is not None:
            self.messages.close()
        self.control.close()
        self._scratch = None
        if self._fallback is not None:
            self._fallback.close()

    # ---- memory

    def segment(self, nbytes: int, own: tuple[int, int], entry: Entry) -> Segment | None:
        """Collective: a segment that every rank maps, reserving its ``own`` byte range; None if there is no room."""
        what = entry.describe()
        fd, offer = -1, b""
        if self.rank == 0:
            try:
                fd, path = self._arena.create(nbytes)
                offer = b"+" + path.encode()
            except OSError as error:
                offer = b"-" + (error.strerror or str(error)).encode()
        answer = self.control.exchange(offer, what)[0].decode()
        segment, problem = None, answer[1:] if answer.startswith("-") else ""
        if not problem:
            try:
                segment = Segment(answer[1:], nbytes, own)
            except (OSError, RuntimeError) as error:
                problem = (error.strerror if isinstance(error, NoSpaceError) else None) or str(error)
            problems = self.control.exchange(problem.encode()[:1000], what)
            problem = next((text.decode(errors="replace") for text in problems if text), "")
        if fd >= 0:
            os.close(fd)
        if not problem:
            return segment
        if self.rank == 0:
            if fd >= 0:
                self._arena.used -= nbytes
            _logger.warning("%s goes over gloo instead of shared memory: %s", what, problem)
        return None

    def free(self, nbytes: int) -> None:
        """A segment of this size is not used any more."""
        if self.rank == 0:
            self._arena.used -= nbytes

    def fallback(self) -> Transport:
        """The transport for what does not fit in shared memory."""
        if self._fallback is None:
            self._fallback = self._make_fallback()
        return self._fallback

    def gather_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> GatherWindow:
        entry = self._ledger.entry("gather_window", dtype, numel, label)
        shard_nbytes = numel // self.size * dtype.itemsize
        own = (self.rank * shard_nbytes, (self.rank + 1) * shard_nbytes)
        if device.type != "cpu":
            return self.fallback().gather_window(numel, dtype, device, label)
        segment = self.segment(max(PAGE, round_up(numel * dtype.itemsize, PAGE)), own, entry)
        if segment is None:
            return self.fallback().gather_window(numel, dtype, device, label)
        return ShmGatherWindow(self, segment, numel, dtype, label, self._enter)

    def reduce_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> ReduceWindow:
        entry = self._ledger.entry("reduce_window", dtype, numel, label)
        row_nbytes = round_up(max(numel * dtype.itemsize, 1), PAGE)
        own = (self.rank * row_nbytes, (self.rank + 1) * row_nbytes)
        if device.type != "cpu":
            return self.fallback().reduce_window(numel, dtype, device, label)
        total = self.size * row_nbytes + round_up(2 * self.size * LINE, PAGE)
        if self.rank == self.size - 1:
            own = (own[0], total)
        segment = self.segment(total, own, entry)
        if segment is None:
            return self.fallback().reduce_window(numel, dtype, device, label)
        return ShmReduceWindow(self, segment, row_nbytes, numel, dtype, label, self._enter)

    # ---- collectives on ordinary tensors

    def serves(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        if not self._have_scratch(entry):
            self.fallback().all_reduce(tensor, op, entry)
            return
        for chunk in tensor.split(_SCRATCH_NBYTES // tensor.itemsize):
            rows = self._side(chunk)
            rows[self.rank].copy_(chunk)
            self.meet(entry)
            reduce_rows(rows, chunk, op)

    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        if not self._have_scratch(entry):
            self.fallback().broadcast(tensor, src, entry)
            return
        for chunk in tensor.split(_SCRATCH_NBYTES // tensor.itemsize):
            rows = self._side(chunk)
            if self.rank == src:
                rows[src].copy_(chunk)
            self.meet(entry)
            if self.rank != src:
                chunk.copy_(rows[src])

    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        if not self._have_scratch(entry):
            self.fallback().all_gather(out, inp, entry)
            return
        targets = out.view(self.size, -1)
        in_place = targets[self.rank].data_ptr() == inp.data_ptr()
        readers = [rank for rank in range(self.size) if not (in_place and rank == self.rank)]
        start = 0
        for chunk in inp.split(_SCRATCH_NBYTES // inp.itemsize):
            rows = self._side(chunk)
            rows[self.rank].copy_(chunk)
            self.meet(entry)
            for rank in readers:
                targets[rank, start : start + chunk.numel()].copy_(rows[rank])
            start += chunk.numel()

    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        if not self._have_scratch(entry):
            self.fallback().reduce_scatter(out, inp, op, entry)
            return
        sources = inp.view(self.size, -1)
        start = 0
        for chunk in out.split(_SCRATCH_NBYTES // self.size // out.itemsize):
            width = chunk.numel()
            rows = self._side(chunk, self.size * width)
            rows[self.rank].view(self.size, width).copy_(sources[:, start : start + width])
            self.meet(entry)
            reduce_rows(rows[:, self.rank * width : (self.rank + 1) * width], chunk, op)
            start += width

    def all_to_all(
        self, out: Tensor, inp: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], entry: Entry
    ) -> None:
        if not self._have_scratch(entry):
            self.fallback().all_to_all(out, inp, out_splits, in_splits, entry)
            return
        # splits differ between ranks: first agree on how many chunks the longest part of any rank takes
        longest = max(int(reply) for reply in self.exchange(b"%d" % max(in_splits), entry))
        slot = _SCRATCH_NBYTES // self.size // inp.itemsize
        sources, targets = inp.split(list(in_splits)), out.split(list(out_splits))
        for start in range(0, longest, slot):
            rows = self._side(inp, self.size * slot)
            for rank, source in enumerate(sources):
                piece = source[start : start + slot]
                rows[self.rank, rank * slot : rank * slot + piece.numel()].copy_(piece)
            self.meet(entry)
            for rank, target in enumerate(targets):
                piece = target[start : start + slot]
                piece.copy_(rows[rank, self.rank * slot : self.rank * slot + piece.numel()])

    def _have_scratch(self, entry: Entry) -> bool:
        if self._scratch is None and not self._scratch_failed:
            row = 2 * _SCRATCH_NBYTES
            self._scratch = self.segment(self.size * row, (self.rank * row, (self.rank + 1) * row), entry)
            self._scratch_failed = self._scratch is None
        return not self._scratch_failed

    def _side(self, like: Tensor, numel: int | None = None) -> Tensor:
        """The next side of every rank's scratch as ``[size, numel]`` of the tensor's dtype (and length)."""
        assert self._scratch is not None
        self._next_side ^= 1
        width = like.numel() if numel is None else numel
        stride = 2 * _SCRATCH_NBYTES // like.itemsize
        offset = self._next_side * _SCRATCH_NBYTES
        return self._scratch.tensor(offset, (self.size, width), like.dtype, (stride, 1))


class ShmGatherWindow(GatherWindow):
    """One mapping of ``numel`` elements shared by all ranks; ``shard`` is this rank's range of it."""

    def __init__(
        self,
        transport: ShmTransport,
        segment: Segment,
        numel: int,
        dtype: torch.dtype,
        label: str,
        enter: Enter,
    ) -> None:
        super().__init__(numel, dtype, size=transport.size, label=label, enter=enter)
        self._transport = transport
        self._segment = segment
        shard_numel = numel // transport.size
        self._own = (transport.rank * shard_numel * dtype.itemsize, (transport.rank + 1) * shard_numel * dtype.itemsize)
        self.full = segment.tensor(0, (numel,), dtype)
        self.shard = segment.tensor(self._own[0], (shard_numel,), dtype)

    def _gather(self, entry: Entry) -> Work:
        return DONE

    def _release(self) -> None:
        self._segment.forget(0, self._own[0])
        self._segment.forget(self._own[1], self._segment.nbytes)

    def _publish(self, entry: Entry) -> None:
        self._transport.meet(entry)

    def _close(self) -> None:
        self._transport.free(self._segment.nbytes)
        del self._segment


class ShmReduceWindow(ReduceWindow):
    """One row of ``numel`` elements per rank in one mapping, then two words per rank: READY and DONE generations."""

    def __init__(
        self,
        transport: ShmTransport,
        segment: Segment,
        row_nbytes: int,
        numel: int,
        dtype: torch.dtype,
        label: str,
        enter: Enter,
    ) -> None:
        super().__init__(numel, dtype, rank=transport.rank, size=transport.size, label=label, enter=enter)
        self.control = transport.control
        self._transport = transport
        self._segment = segment
        self.rows = segment.tensor(0, (self.size, numel), dtype, (row_nbytes // dtype.itemsize, 1))
        self.local = segment.tensor(self.rank * row_nbytes, (numel,), dtype)
        self.words = segment.words(self.size * row_nbytes, 2 * self.size * LINE)
        self.ready = [2 * r * LINE // 8 for r in range(self.size)]
        self.done = [(2 * r + 1) * LINE // 8 for r in range(self.size)]
        self.generation = 0

    def _start(self, entry: Entry, lo: int, hi: int, out: Tensor, accumulate: bool, scale: float) -> Work:
        self.generation += 1
        fence()  # what this rank wrote into its row is visible before the word that says so
        self.words[self.ready[self.rank]] = self.generation
        return ShmReduceWork(self, entry, self.rows[:, lo:hi], out, accumulate, scale)

    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work:
        width = self.numel // self.size
        return self._start(entry, self.rank * width, (self.rank + 1) * width, out, accumulate, scale)

    def _all_reduce(self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None) -> Work:
        # Every rank sums all of it: up to four ranks that moves fewer bytes than summing a part each, writing it where
        # the others can read it, meeting, and copying.
        return self._start(entry, 0, self.numel, out, accumulate, scale)

    def finish(self) -> None:
        """This rank has read what it needed of everybody's rows."""
        fence()
        self.words[self.done[self.rank]] = self.generation

    def _wait_reusable(self) -> None:
        self.control.await_words(self.words, self.done, self.generation, f"wait_reusable {self.label}")

    def _close(self) -> None:
        self._transport.free(self._segment.nbytes)
        self.words.release()
        self.rows = self.local
        del self._segment


class ShmReduceWork(Work):
    """Completed when every rank's row is written; ``wait`` then adds them up on the caller's thread."""

    def __init__(
        self, window: ShmReduceWindow, entry: Entry, rows: Tensor, out: Tensor, accumulate: bool, scale: float
    ) -> None:
        self._window, self._entry = window, entry
        self._rows, self._out = rows, out
        self._accumulate, self._scale = accumulate, scale
        self._generation = window.generation

    def is_completed(self) -> bool:
        window = self._window
        return self.finished or all(window.words[where] >= self._generation for where in window.ready)

    def wait(self) -> None:
        if self.finished:
            return
        window = self._window
        with self._entry.timed():
            window.control.await_words(window.words, window.ready, self._generation, self._entry.describe)
            sum_rows(self._rows, self._out, accumulate=self._accumulate, scale=self._scale)
        window.finish()
        self.finished = True
        del self._rows, self._out
