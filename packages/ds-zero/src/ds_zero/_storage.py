"""Where a unit's parameters live: replicated (stages 0-2) or sharded in a gather window (stage 3).

Vocabulary
    full    the unit's flat parameter buffer, `padded_numel` elements; parameters are views of it while gathered.
    own     the range of the flat that this rank's optimizer writes (all of it at stage 0).
    shard   the range of the flat that belongs to this rank alone (own, except at stage 0).
    publish make what every rank wrote into `own` visible in everyone's `full`.

`full` is one storage for the whole life of the unit: autograd may have saved views of it, so memory is given back
underneath the storage, never by replacing it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_comm import Communicator, Work
from ds_zero.layout import UnitLayout

__all__ = ["ParamStorage", "ReplicatedStorage", "ShardedStorage"]


def layout_dtype(layout: UnitLayout) -> torch.dtype:
    """The torch dtype of a unit's parameters."""
    return getattr(torch, layout.dtype)  # type: ignore[no-any-return]


class ParamStorage(Protocol):
    """What the rest of the runtime knows of a unit's parameter memory."""

    full: Tensor
    own: Tensor
    shard: Tensor
    resident: bool

    def gather(self, async_op: bool = False) -> Work | None: ...

    def release(self) -> None: ...

    def publish(self, bucket_numel: int) -> None: ...

    def write(self, offset: int, values: Tensor) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...


class ReplicatedStorage:
    """Every rank holds all parameters; the optimizer writes the own range, publish all-gathers it."""

    resident = True

    def __init__(
        self, layout: UnitLayout, comm: Communicator, state_range: tuple[int, int], device: torch.device
    ) -> None:
        self._layout = layout
        self._comm = comm
        self.full = torch.zeros(layout.padded_numel, dtype=layout_dtype(layout), device=device)
        self.own = self.full[state_range[0] : state_range[1]]
        start, stop = layout.shard_range(comm.rank)
        self.shard = self.full[start:stop]

    def gather(self, async_op: bool = False) -> Work | None:
        return None

    def release(self) -> None:
        return None

    def publish(self, bucket_numel: int) -> None:
        """All-gather in place, at most `bucket_numel` elements of the flat per collective."""
        if self.own.numel() == self.full.numel():
            return
        size, shard = self._comm.size, self._layout.shard_numel
        step = max(bucket_numel // size, 1)
        if step >= shard:
            self._comm.all_gather_into(self.full, self.own, label=self._layout.name)
            return
        rows = self.full.view(size, shard)
        for start in range(0, shard, step):
            stop = min(start + step, shard)
            out = torch.empty(size * (stop - start), dtype=self.full.dtype, device=self.full.device)
            self._comm.all_gather_into(out, self.own[start:stop], label=self._layout.name)
            rows[:, start:stop].copy_(out.view(size, stop - start))

    def write(self, offset: int, values: Tensor) -> None:
        """Set elements from `offset` on; every rank is given the same values."""
        self.full[offset : offset + values.numel()].copy_(values)

    def settle(self) -> None:
        """Nothing to exchange: every rank wrote everything."""

    def close(self) -> None:
        return None


class ShardedStorage:
    """Each rank holds its shard; `full` is valid between gather and release."""

    def __init__(self, layout: UnitLayout, comm: Communicator, device: torch.device) -> None:
        self._comm = comm
        self._window = comm.gather_window(layout.padded_numel, layout_dtype(layout), device=device, label=layout.name)
        self.full = self._window.full
        self.own = self.shard = self._window.shard
        self._range = layout.shard_range(comm.rank)
        self.resident = False

    def gather(self, async_op: bool = False) -> Work | None:
        self.resident = True
        return self._window.gather(async_op=async_op)  # free if it is there; waits if it is on its way

    def release(self) -> None:
        if self.resident:
            self.resident = False
            self._window.release()

    def publish(self, bucket_numel: int) -> None:
        """Meet the other ranks; later gathers see what they wrote."""
        self._window.publish()

    def write(self, offset: int, values: Tensor) -> None:
        """Set the elements from `offset` on that lie in the own shard; every rank is given the same values."""
        start, stop = self._range
        low, high = max(start, offset), min(stop, offset + values.numel())
        if low < high:
            self.own[low - start : high - start].copy_(values[low - offset : high - offset])

    def settle(self) -> None:
        """Meet, after every rank wrote its part; a resident unit is gathered anew."""
        self._window.publish()
        if self.resident:
            self._window.gather()

    def close(self) -> None:
        self._window.close()
