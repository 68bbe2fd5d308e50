"""What a transport is: the interface that a communicator drives, and the parts all transports share.

Vocabulary
  transport  how the ranks of one group exchange data: ``local`` (one rank), ``shm``, ``gloo`` (all_to_all), ``torch``.
  window     a long-lived flat buffer known to every rank of the group, made collectively, used many times.
  stamp      the fixed-size text of a call (op, label, numel, dtype); ``post`` numbers it and makes it comparable.
  enter      the communicator's "count and stamp this call" function, handed to windows.

Invariants
  - Every rank makes the same calls on a group in the same order; what breaks that is raised on every rank.
  - Reductions of floating CPU tensors add in rank order with fp32 accumulation for 16-bit types, on every transport.
  - A transport owns no process-wide state; closing it gives back everything it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.errors import CommArgumentError
from ds_comm.ledger import Entry


class Enter(Protocol):
    """Count and stamp one call; returns its ledger entry."""

    def __call__(self, op: str, dtype: torch.dtype | None, numel: int, label: str | None) -> Entry: ...


class Work(ABC):
    """An operation under way. ``wait`` may be called any number of times; results are valid after it returned."""

    finished = False
    """True once ``wait`` has returned."""

    @abstractmethod
    def wait(self) -> None:
        """Finish the operation: on return its outputs are there (on an accelerator: ordered on the current stream)."""

    @abstractmethod
    def is_completed(self) -> bool:
        """True when ``wait`` would not have to wait for another rank. Never blocks."""


class CompletedWork(Work):
    """Nothing left to do."""

    finished = True

    def wait(self) -> None:
        return None

    def is_completed(self) -> bool:
        return True


DONE = CompletedWork()


class Receipt(Work):
    """A receive whose tensor is made for it: ``data`` (uint8 [nbytes]) is there once ``wait`` has returned."""

    data: Tensor


class Packet(ABC):
    """Bytes to be sent: write all of ``data`` (uint8 [nbytes]), then ``send`` once, and write no more.

    ``lasting``: the same tensor object comes again with later packets, so what is made from it may be kept.
    """

    __slots__ = ()
    data: Tensor
    lasting: bool

    @abstractmethod
    def send(self) -> Work:
        """Start sending; see ``Work``."""


class Messenger(ABC):
    """Messages between two ranks without torch.distributed. Ranks are group ranks; tensors are on the CPU, strided."""

    @abstractmethod
    def isend(self, tensor: Tensor, dst: int, tag: int, entry: Entry) -> Work: ...

    @abstractmethod
    def irecv(self, tensor: Tensor, src: int, tag: int, entry: Entry) -> Work: ...

    @abstractmethod
    def packet(self, nbytes: int, dst: int, tag: int, entry: Entry) -> Packet: ...

    @abstractmethod
    def receive(self, nbytes: int, src: int, tag: int, entry: Entry) -> Receipt: ...

    @abstractmethod
    def probe(self, tag: int, entry: Entry) -> int:
        """Wait for a message of this tag that nobody has asked for; returns its sender."""

    @abstractmethod
    def close(self) -> None: ...


class TorchWork(Work):
    """A torch work and what must be done once it is finished, on the caller's thread, exactly once."""

    def __init__(
        self,
        works: Sequence[dist.Work],
        *,
        entry: Entry,
        block: Callable[[dist.Work, Entry], None],
        then: Callable[[], object] | None = None,
    ) -> None:
        self._works = list(works)
        self._entry = entry
        self._block = block
        self._then = then

    def wait(self) -> None:
        if self.finished:
            return
        with self._entry.timed():
            while self._works:
                self._block(self._works[0], self._entry)
                del self._works[0]
            if self._then is not None:
                self._then()
                self._then = None
        self.finished = True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class GatherWindow(ABC):
    """One flat buffer split in ``size`` equal shards, one owned by each rank.

    full: ``[numel]``, one storage for the whole life of the window (autograd may have saved views of it); its content
    is valid between ``gather`` and ``release``. shard: ``[numel / size]``, this rank's own, always resident and valid.
    """

    full: Tensor
    shard: Tensor

    def __init__(self, numel: int, dtype: torch.dtype, *, size: int, label: str, enter: Enter) -> None:
        if numel % size != 0:
            raise CommArgumentError(
                f"gather_window {label!r}: {numel} elements do not split over {size} ranks; pad to a multiple of {size}"
            )
        self.numel, self.dtype, self.size, self.label = numel, dtype, size, label
        self.closed = False
        self._enter = enter
        self._valid = False
        self._gathering: Work = DONE

    def gather(self, *, async_op: bool = False) -> Work | None:
        """Make ``full`` valid. Free while it already is; else one all_gather (counted as such on every transport).

        With ``async_op`` returns a Work whose ``wait`` must be called before ``full`` is read; calls before that return
        the same Work, or wait for it.
        """
        self._check_open()
        if not self._valid:
            entry = self._enter("all_gather", self.dtype, self.numel, self.label)
            self._gathering = self._gather(entry)
            self._valid = True
        if async_op:
            return self._gathering
        self._gathering.wait()
        return None

    def release(self) -> None:
        """Give back the memory of ``full`` (its storage object stays, without content).

        Local; waits only for a gather that is still under way, which would write into memory given back.
        """
        self._check_open()
        self._settle()
        self._release()

    def publish(self) -> None:
        """Collective, after writing ``shard``: every rank's next ``gather`` sees the new content of all shards.

        Before anyone *writes* its shard every rank must have stopped reading ``full``: on shm both are one memory. Any
        meeting of the ranks in between (a barrier, a waited-for reduction) is enough.
        """
        self._check_open()
        self._settle()
        self._publish(self._enter("publish", self.dtype, 0, self.label))

    def close(self) -> None:
        """Let go of the buffers; tensors that the caller still holds stay usable. Local."""
        if not self.closed:
            self.closed = True
            self._close()
            empty = torch.empty(0, dtype=self.dtype)
            self.full = self.shard = empty

    def _settle(self) -> None:
        """``full`` is not valid any more, and nobody is writing into it."""
        self._gathering.wait()
        self._gathering = DONE
        self._valid = False

    def _check_open(self) -> None:
        if self.closed:
            raise CommArgumentError(f"window {self.label!r} is closed; make a new one with gather_window()")

    @abstractmethod
    def _gather(self, entry: Entry) -> Work: ...

    @abstractmethod
    def _release(self) -> None: ...

    @abstractmethod
    def _publish(self, entry: Entry) -> None: ...

    def _close(self) -> None:
        return None


class ReduceWindow(ABC):
    """Every rank has its own full-size buffer; reductions read all of them.

    local: ``[numel]``, this rank's contribution. Its content is unspecified after a reduction.
    """

    local: Tensor

    def __init__(self, numel: int, dtype: torch.dtype, *, rank: int, size: int, label: str, enter: Enter) -> None:
        if numel % size != 0:
            raise CommArgumentError(
                f"reduce_window {label!r}: {numel} elements do not split over {size} ranks; pad to a multiple of {size}"
            )
        self.numel, self.dtype, self.rank, self.size, self.label = numel, dtype, rank, size, label
        self.closed = False
        self._enter = enter
        self._pending: Work | None = None

    def reduce_scatter(
        self,
        out: Tensor,
        *,
        accumulate: bool = False,
        scale: float = 1.0,
        bucket_numel: int | None = None,
        label: str | None = None,
    ) -> Work:
        """Start ``out (+)= scale * (sum over ranks, in rank order, of local[own range])``.

        out: contiguous ``[numel / size]``, fp32 or the window's dtype (fp32 if ``accumulate``); written by the Work's
        ``wait``. The sum is fp32 for 16-bit windows and rounded once. bucket_numel: largest number of elements of one
        transfer; the result does not depend on it. One reduction per window may be under way.
        """
        self._check(out, self.numel // self.size, accumulate, "reduce_scatter", bucket_numel)
        entry = self._enter("reduce_scatter", self.dtype, self.numel, label or self.label)
        self._pending = self._reduce_scatter(entry, out, accumulate, scale, bucket_numel)
        return self._pending

    def all_reduce(
        self,
        out: Tensor,
        *,
        accumulate: bool = False,
        scale: float = 1.0,
        bucket_numel: int | None = None,
        label: str | None = None,
    ) -> Work:
        """As ``reduce_scatter`` for all ranges: out ``[numel]``, the same bits as the concatenation of its results."""
        self._check(out, self.numel, accumulate, "all_reduce", bucket_numel)
        entry = self._enter("all_reduce", self.dtype, self.numel, label or self.label)
        self._pending = self._all_reduce(entry, out, accumulate, scale, bucket_numel)
        return self._pending

    def wait_reusable(self) -> None:
        """Block until every rank has finished reading ``local``: call it before writing there again."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        self._wait_reusable()

    def close(self) -> None:
        """Let go of the buffers. Local; the last reduction must have been waited for."""
        if not self.closed:
            self.closed = True
            self._pending = None
            self._close()
            self.local = torch.empty(0, dtype=self.dtype)

    def _check(self, out: Tensor, numel: int, accumulate: bool, op: str, bucket_numel: int | None) -> None:
        where = f"{op} on window {self.label!r}"
        if self.closed:
            raise CommArgumentError(f"{where}: the window is closed; make a new one with reduce_window()")
        if out.shape != (numel,) or not out.is_contiguous() or out.device != self.local.device:
            raise CommArgumentError(
                f"{where}: out is {tuple(out.shape)} on {out.device}; "
                f"expected contiguous [{numel}] on {self.local.device}"
            )
        if out.dtype not in (self.dtype, torch.float32) or (accumulate and out.dtype != torch.float32):
            expected = "torch.float32 to accumulate into" if accumulate else f"torch.float32 or {self.dtype}"
            raise CommArgumentError(f"{where}: out has {out.dtype}; expected {expected}")
        if bucket_numel is not None and bucket_numel <= 0:
            raise CommArgumentError(f"{where}: bucket_numel={bucket_numel}; expected a positive number of elements")
        if self._pending is not None and not self._pending.finished:
            raise CommArgumentError(f"{where}: the last reduction on it was not waited for; call its wait() first")

    @abstractmethod
    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work: ...

    @abstractmethod
    def _all_reduce(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work: ...

    @abstractmethod
    def _wait_reusable(self) -> None: ...

    def _close(self) -> None:
        return None


class Transport(ABC):
    """How one group's ranks exchange data. Ranks are group ranks; tensors are contiguous and checked by the caller."""

    kind: str
    messages: Messenger | None = None
    """Who carries messages between two ranks; None: torch.distributed."""

    @abstractmethod
    def post(self, stamp: bytes) -> None:
        """Number this rank's next call; raises what another rank has already found wrong."""

    @abstractmethod
    def meet(self, entry: Entry, limit: float | None = None) -> None:
        """Return when every rank has come here: the barrier. limit: seconds instead of the watchdog's."""

    def block(self, work: dist.Work, entry: Entry, limit: float | None = None) -> None:
        """Wait for a torch work, watching the peers where the transport can."""
        work.wait()

    def delegate(self, start: Callable[..., dist.Work | None], entry: Entry) -> Work:
        """Let torch.distributed do a collective: ``start(async_op=True)`` gives its work."""
        work = start(async_op=True)
        return DONE if work is None else TorchWork([work], entry=entry, block=self.block)

    def block_message(self, work: dist.Work, entry: Entry) -> None:
        """Wait for a message between two ranks: gloo's tell that they are completed only in their own ``wait``."""
        self.block(work, entry)

    def guard(self, call: Callable[[], None], entry: Entry) -> None:
        """Run a collective of torch.distributed that cannot be asynchronous."""
        call()

    @abstractmethod
    def exchange(self, payload: bytes, entry: Entry) -> list[bytes]:
        """Every rank's payload (short: some kilobytes), in rank order."""

    @abstractmethod
    def serves(self, tensor: Tensor) -> bool:
        """Whether the collectives below can take this tensor (device and dtype); else torch.distributed does it."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        """In place."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        """In place, from group rank ``src``."""

    @abstractmethod
    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        """out: flat ``[size * n]``, inp: flat ``[n]``."""

    @abstractmethod
    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        """out: flat ``[n]``, inp: flat ``[size * n]``."""

    @abstractmethod
    def all_to_all(
        self, out: Tensor, inp: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], entry: Entry
    ) -> None:
        """Flat tensors; splits are elements per rank."""

    @abstractmethod
    def gather_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> GatherWindow: ...

    @abstractmethod
    def reduce_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> ReduceWindow: ...

    def fail(self, error: Exception) -> None:
        """Tell every rank of the group, then raise ``error``."""
        raise error

    @abstractmethod
    def close(self) -> None:
        """Give back everything; peers that still wait for this rank are told that it has left."""
