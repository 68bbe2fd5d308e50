"""Transport for CPU tensors over gloo, across hosts (and where shared memory is not to be had).

gloo's own reduce_scatter adds in an order that depends on size and rank count, and is several times slower than its
all_to_all. So a reduction here is: every rank sends each peer the peer's part (all_to_all_single, as bytes, which any
dtype can be), and adds the parts up in rank order. The bits are those of the shm transport.
An all_reduce is that followed by an all_gather; a small one is one all_to_all of everything and a local sum.

Every collective is preceded, on the group's lane, by an exchange of headers: number, stamp, and a checksum of all
stamps so far. All ranks see all headers, so all raise the same DivergenceError before any data has moved.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.errors import CommError, DivergenceError
from ds_comm.kernels import sum_rows
from ds_comm.ledger import STAMP_TEXT_NBYTES, Entry, describe_stamp
from ds_comm.transport._lane import Job, Lane, LaneWork
from ds_comm.transport._observer import Observer
from ds_comm.transport._reduce import reduce_rows
from ds_comm.transport.base import Enter, ReduceWindow, Work
from ds_comm.transport.torch_ import TorchReduceWindow, TorchTransport, apply_all
from ds_comm.watchdog import SAME_CALLS

_SMALL_NBYTES = 32768
"""Up to this size an all_reduce sends everything to everybody: one round trip instead of two."""

_HEADER = struct.Struct(f"<qq{STAMP_TEXT_NBYTES}s")


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a flat contiguous tensor as uint8."""
    # a single element may carry any stride, which ``view`` to another size refuses
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class GlooTransport(TorchTransport):
    """See the module's docstring."""

    kind = "gloo"

    def __init__(self, group: dist.ProcessGroup, *, enter: Enter, observer: Observer) -> None:
        super().__init__(group, enter=enter, observer=observer)
        self._watch = observer
        self._lane = Lane("ds_comm-lane")
        self._posted = 0
        self._chain = 0
        self._agreed = "none"

    # ---- the lane

    def post(self, stamp: bytes) -> None:
        super().post(stamp)
        self._posted += 1
        self._chain = zlib.crc32(stamp, self._chain)

    def submit(self, run: Callable[[], None], entry: Entry, then: Callable[[], object] | None = None) -> Work:
        """Queue a collective; ``then`` runs on the thread that waits for it."""
        header = _HEADER.pack(self._posted, self._chain, entry.stamp)

        def checked() -> None:
            self._compare(header, entry)
            run()

        return LaneWork(self._lane.submit(checked), entry, self._block_job, then)

    def _block_job(self, job: Job, entry: Entry, limit: float | None = None) -> None:
        self._watch.block(job.done.wait, entry.describe(), limit)
        if isinstance(job.error, CommError):
            self._watch.fail(job.error)
            raise type(job.error)(str(job.error))
        if job.error is not None:
            self._watch.explain(job.error, entry.describe())

    def _compare(self, header: bytes, entry: Entry) -> None:
        """On the lane: all ranks' headers must be equal."""
        own = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        received = torch.empty(self.size * len(header), dtype=torch.uint8)
        dist.all_to_all_single(received, own.repeat(self.size), group=self.group)
        rows = received.view(self.size, -1)
        if bool((rows == own).all()):
            self._agreed = entry.describe()
            return
        found = [_HEADER.unpack(bytes(row.tolist())) for row in rows]
        ranks = dist.get_process_group_ranks(self.group)
        calls = "; ".join(f"rank {rank}: {describe_stamp(f[2])}" for rank, f in zip(ranks, found, strict=True))
        if len({stamp for _, _, stamp in found}) == 1:
            calls += f"; they differ in a call before it that moves no data (calls so far: {[f[0] for f in found]})"
        raise DivergenceError(
            f"the ranks disagree on a collective of this group of {self.size}: {calls}. The last call they agreed on: "
            f"{self._agreed}. {SAME_CALLS}"
        )

    # ---- the interface

    def run(self, start: Callable[..., Any], entry: Entry) -> None:
        self.submit(lambda: start(async_op=False), entry).wait()

    def meet(self, entry: Entry, limit: float | None = None) -> None:
        # the exchange of headers that precedes every job is a meeting
        header = _HEADER.pack(self._posted, self._chain, entry.stamp)
        self._block_job(self._lane.submit(lambda: self._compare(header, entry)), entry, limit)

    def delegate(self, start: Callable[..., dist.Work | None], entry: Entry) -> Work:
        return self.submit(lambda: _finish(start(async_op=True)), entry)

    def guard(self, call: Callable[[], None], entry: Entry) -> None:
        self.submit(call, entry).wait()

    def exchange(self, payload: bytes, entry: Entry) -> list[bytes]:
        replies: list[Any] = [None] * self.size
        self.guard(lambda: dist.all_gather_object(replies, payload, group=self.group), entry)
        return [bytes(reply) for reply in replies]

    def serves(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        self.submit(
            lambda: self._reduce_everywhere(tensor, lambda rows, out: reduce_rows(rows, out, op), tensor), entry
        ).wait()

    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        self.start_gather(out, inp, entry).wait()

    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        super().broadcast(as_bytes(tensor), src, entry)

    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        rows = torch.empty_like(inp)
        self.submit(lambda: self._swap(rows, inp), entry).wait()
        reduce_rows(rows.view(self.size, -1), out, op)

    def all_to_all(
        self, out: Tensor, inp: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], entry: Entry
    ) -> None:
        item = inp.itemsize
        super().all_to_all(
            as_bytes(out), as_bytes(inp), [n * item for n in out_splits], [n * item for n in in_splits], entry
        )

    def reduce_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> ReduceWindow:
        if device.type != "cpu":
            return super().reduce_window(numel, dtype, device, label)
        return GlooReduceWindow(self, numel, dtype, device, label, self._enter)

    def close(self) -> None:
        self._lane.close()
        super().close()

    # ---- what windows are made of

    def start_gather(self, out: Tensor, shard: Tensor, entry: Entry) -> Work:
        if shard.device.type != "cpu":
            return super().start_gather(out, shard, entry)
        return self.submit(lambda: self._spread(out, shard), entry)

    def start_sum(
        self, local: Tensor, entry: Entry, finish: Callable[[Tensor, slice], None], bucket_width: int
    ) -> Work:
        """Like ``start_reduce_scatter``, but ``finish`` gets all ranks' rows ``[size, width]`` of the own range."""
        table = local.view(self.size, -1)
        width = table.shape[1]
        parts: list[tuple[Tensor, slice]] = []

        def run() -> None:
            for start in range(0, width, bucket_width):
                where = slice(start, min(start + bucket_width, width))
                source = local if bucket_width >= width else table[:, where].contiguous().view(-1)
                rows = torch.empty_like(source)
                self._swap(rows, source)
                parts.append((rows.view(self.size, -1), where))

        return self.submit(run, entry, lambda: apply_all(finish, parts))

    def start_sum_everywhere(
        self, local: Tensor, target: Tensor, scale: float, bucket_numel: int, entry: Entry, then: Callable[[], object]
    ) -> Work:
        """target ``[n]`` = scale * the ordered sum of all ranks' ``local`` ``[n]``, then ``then()``."""

        def run() -> None:
            for start in range(0, local.numel(), bucket_numel):
                where = slice(start, start + bucket_numel)
                self._reduce_everywhere(
                    local[where], lambda rows, total: sum_rows(rows, total, scale=scale), target[where]
                )

        return self.submit(run, entry, then)

    # ---- steps of a job: on the lane only

    def _swap(self, out: Tensor, inp: Tensor) -> None:
        """Part i of inp to rank i; out collects the parts sent here."""
        dist.all_to_all_single(as_bytes(out), as_bytes(inp), group=self.group)

    def _spread(self, out: Tensor, part: Tensor) -> None:
        """out: every rank's part, one after the other."""
        self._swap(out, part.repeat(self.size))

    def _reduce_everywhere(self, tensor: Tensor, reduce: Callable[[Tensor, Tensor], None], out: Tensor) -> None:
        """out ``[n]`` = ``reduce`` of all ranks' ``tensor`` ``[n]``; out may be the tensor itself."""
        numel = tensor.numel()
        if tensor.nbytes <= _SMALL_NBYTES:
            rows = torch.empty(self.size * numel, dtype=tensor.dtype)
            self._spread(rows, tensor)
            reduce(rows.view(self.size, numel), out)
            return
        width = -(-numel // self.size)
        padded = tensor
        if width * self.size != numel:
            padded = torch.cat([tensor, tensor.new_zeros(width * self.size - numel)])
        rows = torch.empty_like(padded)
        self._swap(rows, padded)
        mine = torch.empty(width, dtype=out.dtype)
        reduce(rows.view(self.size, width), mine)
        gathered = torch.empty(width * self.size, dtype=out.dtype)
        self._spread(gathered, mine)
        out.copy_(gathered[:numel])


class GlooReduceWindow(TorchReduceWindow):
    """Sums in rank order, like shared memory."""

    _transport: GlooTransport

    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work:
        return self._transport.start_sum(
            self.local,
            entry,
            lambda rows, where: sum_rows(rows, out[where], accumulate=accumulate, scale=scale),
            max(1, (bucket_numel or self.numel) // self.size),
        )

    def _all_reduce(self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None) -> Work:
        target = torch.empty_like(out) if accumulate else out
        return self._transport.start_sum_everywhere(
            self.local,
            target,
            scale,
            bucket_numel or self.numel,
            entry,
            (lambda: out.add_(target)) if accumulate else (lambda: None),
        )


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
