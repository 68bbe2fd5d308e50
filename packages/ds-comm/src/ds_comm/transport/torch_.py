"""Transport by torch.distributed as it is: NCCL and other device backends, and the fake world.

Windows free the memory of ``full`` with ``storage.resize_``: the storage object stays, so tensors that autograd saved
stay valid once it is gathered again. Order and accumulation type of a reduction are the backend's.
``observer`` posts the stamps out of band; it is None in a fake world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.ledger import Entry
from ds_comm.transport._observer import Observer
from ds_comm.transport.base import Enter, GatherWindow, ReduceWindow, TorchWork, Transport, Work

# torch 2.13 renamed these two
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class TorchTransport(Transport):
    """Every call goes to the group's own backend."""

    kind = "torch"

    def __init__(
        self, group: dist.ProcessGroup, *, enter: Enter, observer: Observer | None, fake: bool = False
    ) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.fake = fake
        self._enter = enter
        self._observer = observer

    def post(self, stamp: bytes) -> None:
        if self._observer is not None:
            self._observer.post(stamp)

    def block(self, work: dist.Work, entry: Entry, limit: float | None = None) -> None:
        if self._observer is not None:
            with self._observer.watching(entry.describe(), limit):
                work.wait()
        else:
            work.wait()

    def run(self, start: Callable[..., Any], entry: Entry) -> None:
        """Start a torch collective and wait for it, watching the peers."""
        work = start(async_op=True)
        if work is not None:
            self.block(work, entry)

    def meet(self, entry: Entry, limit: float | None = None) -> None:
        work = dist.barrier(group=self.group, async_op=True)
        if work is not None:
            self.block(work, entry, limit)

    def exchange(self, payload: bytes, entry: Entry) -> list[bytes]:
        if self.fake:
            return [payload] * self.size
        replies: list[Any] = [None] * self.size
        dist.all_gather_object(replies, payload, group=self.group)
        return [bytes(reply) for reply in replies]

    def serves(self, tensor: Tensor) -> bool:
        return False

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        self.run(lambda async_op: dist.all_reduce(tensor, op, group=self.group, async_op=async_op), entry)

    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        self.run(
            lambda async_op: dist.broadcast(tensor, group_src=src, group=self.group, async_op=async_op),
            entry,
        )

    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        self.run(lambda async_op: all_gather_single(out, inp, group=self.group, async_op=async_op), entry)

    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        self.run(lambda async_op: reduce_scatter_single(out, inp, op, group=self.group, async_op=async_op), entry)

    def all_to_all(
        self, out: Tensor, inp: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], entry: Entry
    ) -> None:
        self.run(
            lambda async_op: dist.all_to_all_single(
                out, inp, list(out_splits), list(in_splits), group=self.group, async_op=async_op
            ),
            entry,
        )

    def gather_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> GatherWindow:
        return TorchGatherWindow(self, numel, dtype, device, label, self._enter)

    def reduce_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> ReduceWindow:
        return TorchReduceWindow(self, numel, dtype, device, label, self._enter)

    def fail(self, error: Exception) -> None:
        if self._observer is not None:
            self._observer.fail(error)
        raise error

    def close(self) -> None:
        if self._observer is not None:
            self._observer.close()

    # ---- what windows are made of; the gloo transport has its own

    def start_gather(self, out: Tensor, shard: Tensor, entry: Entry) -> Work:
        work = all_gather_single(out, shard, group=self.group, async_op=True)
        return TorchWork([work], entry=entry, block=self.block)

    def start_reduce_scatter(
        self, local: Tensor, entry: Entry, finish: Callable[[Tensor, slice], None], bucket_width: int
    ) -> Work:
        """Reduce ``local`` in buckets; ``finish(total, where)`` takes each bucket's sum and its range of the shard."""
        table = local.view(self.size, -1)
        width = table.shape[1]
        works, parts = [], []
        for start in range(0, width, bucket_width):
            where = slice(start, min(start + bucket_width, width))
            source = local if bucket_width >= width else table[:, where].contiguous().view(-1)
            total = self._empty(where.stop - where.start, local)
            works.append(reduce_scatter_single(total, source, group=self.group, async_op=True))
            parts.append((total, where))
        return self._work(works, entry, lambda: apply_all(finish, parts))

    def start_all_reduce(
        self, local: Tensor, entry: Entry, finish: Callable[[Tensor, slice], None], bucket_numel: int
    ) -> Work:
        """Reduce ``local`` in place, in buckets; ``finish`` takes each bucket's sum and its range."""
        works, parts = [], []
        for start in range(0, local.numel(), bucket_numel):
            where = slice(start, min(start + bucket_numel, local.numel()))
            works.append(dist.all_reduce(local[where], group=self.group, async_op=True))
            parts.append((local[where], where))
        return self._work(works, entry, lambda: apply_all(finish, parts))

    def _work(self, works: Sequence[dist.Work | None], entry: Entry, then: Callable[[], object]) -> Work:
        started = [work for work in works if work is not None]
        return TorchWork(started, entry=entry, block=self.block, then=then)

    def _empty(self, numel: int, like: Tensor) -> Tensor:
        # the fake backend writes nothing: zeros keep what is added up from it finite
        make = torch.zeros if self.fake else torch.empty
        return make(numel, dtype=like.dtype, device=like.device)


def apply_all(finish: Callable[[Tensor, slice], None], parts: Sequence[tuple[Tensor, slice]]) -> None:
    """Hand every bucket's result and range to ``finish``."""
    for result, where in parts:
        finish(result, where)


class TorchGatherWindow(GatherWindow):
    """``full`` has memory only between gather and release; ``shard`` is memory of its own."""

    def __init__(
        self, transport: TorchTransport, numel: int, dtype: torch.dtype, device: torch.device, label: str, enter: Enter
    ) -> None:
        super().__init__(numel, dtype, size=transport.size, label=label, enter=enter)
        self._transport = transport
        self.full = torch.empty(numel, dtype=dtype, device=device)
        self.shard = torch.zeros(numel // transport.size, dtype=dtype, device=device)
        self._nbytes = numel * dtype.itemsize
        self.full.untyped_storage().resize_(0)

    def _gather(self, entry: Entry) -> Work:
        self.full.untyped_storage().resize_(self._nbytes)
        return self._transport.start_gather(self.full.detach(), self.shard.detach(), entry)

    def _release(self) -> None:
        self.full.untyped_storage().resize_(0)

    def _publish(self, entry: Entry) -> None:
        return None


class TorchReduceWindow(ReduceWindow):
    """``local`` is this rank's memory; sums arrive in memory of their own (or, for all_reduce, in ``local``)."""

    def __init__(
        self, transport: TorchTransport, numel: int, dtype: torch.dtype, device: torch.device, label: str, enter: Enter
    ) -> None:
        super().__init__(numel, dtype, rank=transport.rank, size=transport.size, label=label, enter=enter)
        self._transport = transport
        self.local = torch.zeros(numel, dtype=dtype, device=device)

    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work:
        width = max(1, (bucket_numel or self.numel) // self.size)
        return self._transport.start_reduce_scatter(
            self.local, entry, lambda total, where: _store(out[where], total, accumulate, scale), width
        )

    def _all_reduce(self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None) -> Work:
        return self._transport.start_all_reduce(
            self.local,
            entry,
            lambda total, where: _store(out[where], total, accumulate, scale),
            max(1, bucket_numel or self.numel),
        )

    def _wait_reusable(self) -> None:
        return None


def _store(out: Tensor, total: Tensor, accumulate: bool, scale: float) -> None:
    """out (+)= scale * total, the product in fp32."""
    if scale != 1.0:
        total = total.to(torch.float32) * scale if total.dtype.itemsize < 4 else total * scale
    if accumulate:
        out.add_(total)
    else:
        out.copy_(total)
