"""Transport for CPU tensors over gloo, across hosts (and where shared memory is not to be had).

gloo's own reduce_scatter adds in an order that depends on size and rank count, and is several times slower than its
all_to_all. So a reduction here is: every rank sends each peer the peer's part (all_to_all_single, as bytes, which any
dtype can be), and adds the parts up in rank order. The bits are those of the shm transport.
An all_reduce is that followed by an all_gather; a small one is one all_to_all of everything and a local sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.kernels import sum_rows
from ds_comm.ledger import Entry
from ds_comm.transport._reduce import reduce_rows
from ds_comm.transport.base import DONE, ReduceWindow, Work
from ds_comm.transport.torch_ import TorchReduceWindow, TorchTransport, apply_all

_SMALL_NBYTES = 32768
"""Up to this size an all_reduce sends everything to everybody: one round trip instead of two."""


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a flat contiguous tensor as uint8."""
    # a single element may carry any stride, which ``view`` to another size refuses
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class GlooTransport(TorchTransport):
    """See the module's docstring."""

    kind = "gloo"
    polls = True

    def serves(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        self.reduce_everywhere(tensor, lambda rows, out: reduce_rows(rows, out, op), tensor, entry)

    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        self.start_gather(out, inp, entry).wait()

    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        super().broadcast(as_bytes(tensor), src, entry)

    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        rows = torch.empty_like(inp)
        self._all_to_all(rows, inp, entry)
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

    def start_gather(self, out: Tensor, shard: Tensor, entry: Entry) -> Work:
        if shard.device.type != "cpu":
            return super().start_gather(out, shard, entry)
        work = dist.all_to_all_single(as_bytes(out), as_bytes(shard).repeat(self.size), group=self.group, async_op=True)
        return self._work([work], entry, lambda: None)

    def start_sum(
        self, local: Tensor, entry: Entry, finish: Callable[[Tensor, slice], None], bucket_width: int
    ) -> Work:
        """Like ``start_reduce_scatter``, but ``finish`` gets all ranks' rows ``[size, width]`` of the own range."""
        table = local.view(self.size, -1)
        width = table.shape[1]
        works, parts = [], []
        for start in range(0, width, bucket_width):
            where = slice(start, min(start + bucket_width, width))
            source = local if bucket_width >= width else table[:, where].contiguous().view(-1)
            rows = torch.empty_like(source)
            works.append(dist.all_to_all_single(as_bytes(rows), as_bytes(source), group=self.group, async_op=True))
            parts.append((rows.view(self.size, -1), where))
        return self._work(works, entry, lambda: apply_all(finish, parts))

    def reduce_everywhere(
        self, tensor: Tensor, reduce: Callable[[Tensor, Tensor], None], out: Tensor, entry: Entry
    ) -> None:
        """out ``[n]`` = ``reduce`` of all ranks' ``tensor`` ``[n]``; out may be the tensor itself."""
        numel = tensor.numel()
        if tensor.nbytes <= _SMALL_NBYTES:
            rows = torch.empty(self.size * numel, dtype=tensor.dtype)
            self._all_to_all(rows, tensor.repeat(self.size), entry)
            reduce(rows.view(self.size, numel), out)
            return
        width = -(-numel // self.size)
        padded = tensor
        if width * self.size != numel:
            padded = torch.cat([tensor, tensor.new_zeros(width * self.size - numel)])
        rows = torch.empty_like(padded)
        self._all_to_all(rows, padded, entry)
        mine = torch.empty(width, dtype=out.dtype)
        reduce(rows.view(self.size, width), mine)
        gathered = torch.empty(width * self.size, dtype=out.dtype)
        self.all_gather(gathered, mine, entry)
        out.copy_(gathered[:numel])

    def _all_to_all(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        self.run(
            lambda async_op: dist.all_to_all_single(as_bytes(out), as_bytes(inp), group=self.group, async_op=async_op),
            entry,
        )


class GlooReduceWindow(TorchReduceWindow):
    """Sums in rank order, like shared memory."""

    _transport: GlooTransport

    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work:
        width = max(1, (bucket_numel or self.numel) // self.size)
        return self._transport.start_sum(
            self.local,
            entry,
            lambda rows, where: sum_rows(rows, out[where], accumulate=accumulate, scale=scale),
            width,
        )

    def _all_reduce(self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None) -> Work:
        # In one go: the second half must start in the same order on every rank, which waits and polls do not promise.
        target = torch.empty_like(out) if accumulate else out
        for start in range(0, self.numel, bucket_numel or self.numel):
            where = slice(start, min(start + (bucket_numel or self.numel), self.numel))
            self._transport.reduce_everywhere(
                self.local[where], lambda rows, total: sum_rows(rows, total, scale=scale), target[where], entry
            )
        if accumulate:
            out.add_(target)
        return DONE
