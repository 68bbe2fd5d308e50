"""Transport of a group of one rank: nothing moves, everything still counts in the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.kernels import sum_rows
from ds_comm.ledger import Entry
from ds_comm.transport.base import DONE, Enter, GatherWindow, ReduceWindow, Transport, Work


class LocalTransport(Transport):
    """Collectives of one rank are copies or nothing."""

    kind = "local"

    def __init__(self, enter: Enter) -> None:
        self._enter = enter

    def post(self, stamp: bytes) -> None:
        return None

    def meet(self, entry: Entry, limit: float | None = None) -> None:
        return None

    def exchange(self, payload: bytes, entry: Entry) -> list[bytes]:
        return [payload]

    def serves(self, tensor: Tensor) -> bool:
        return True

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        return None

    def broadcast(self, tensor: Tensor, src: int, entry: Entry) -> None:
        return None

    def all_gather(self, out: Tensor, inp: Tensor, entry: Entry) -> None:
        out.copy_(inp)

    def reduce_scatter(self, out: Tensor, inp: Tensor, op: dist.ReduceOp.RedOpType, entry: Entry) -> None:
        out.copy_(inp)

    def all_to_all(
        self, out: Tensor, inp: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], entry: Entry
    ) -> None:
        out.copy_(inp)

    def gather_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> GatherWindow:
        return LocalGatherWindow(numel, dtype, device, label, self._enter)

    def reduce_window(self, numel: int, dtype: torch.dtype, device: torch.device, label: str) -> ReduceWindow:
        return LocalReduceWindow(numel, dtype, device, label, self._enter)

    def close(self) -> None:
        return None


class LocalGatherWindow(GatherWindow):
    """``full`` and ``shard`` are the same memory, always there."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, label: str, enter: Enter) -> None:
        super().__init__(numel, dtype, size=1, label=label, enter=enter)
        self.full = torch.zeros(numel, dtype=dtype, device=device)
        self.shard = self.full.detach()

    def _gather(self, entry: Entry) -> Work:
        return DONE

    def _release(self) -> None:
        return None

    def _publish(self, entry: Entry) -> None:
        return None


class LocalReduceWindow(ReduceWindow):
    """The sum of one rank is its contribution, scaled."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, label: str, enter: Enter) -> None:
        super().__init__(numel, dtype, rank=0, size=1, label=label, enter=enter)
        self.local = torch.zeros(numel, dtype=dtype, device=device)

    def _reduce_scatter(
        self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None
    ) -> Work:
        sum_rows(self.local.view(1, -1), out, accumulate=accumulate, scale=scale)
        return DONE

    def _all_reduce(self, entry: Entry, out: Tensor, accumulate: bool, scale: float, bucket_numel: int | None) -> Work:
        return self._reduce_scatter(entry, out, accumulate, scale, bucket_numel)

    def _wait_reusable(self) -> None:
        return None
