"""Gradients on their way: from `param.grad` through a reduce window into the unit's mean gradient.

One micro-batch reduces every trainable unit exactly once, in an order that all ranks agree on (the *plan*): first the
reverse of the units, later the order in which rank 0 saw them complete. A unit is launched when it is complete and
all units before it in the plan have been launched; what is left when the micro-batch ends is launched by `flush` with
zeros for missing gradients. So the set and order of collectives depends on the plan alone, never on hooks that fire.

Windows
    stage 1       one window per unit, for good: it is the full gradient buffer of the memory law, slower ranks may lag
                  a whole backward behind, and the reduced gradient is written back into its own range (nobody else's)
    other stages  two windows per size, reused round robin by position among the units of that size in the plan
Sums over ranks are in rank order with fp32 accumulation, and each micro-batch is added to the fp32 accumulator in
order: one rank that accumulates N micro-batches gives the same bits as N ranks with one each.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_comm import Communicator, ReduceWindow, Work
from ds_zero._unit import GradKind, Unit
from ds_zero.config import ZeroConfig
from ds_zero.errors import ZeroStateError
from ds_zero.precision import DTYPES

__all__ = ["GradientReducer"]

WINDOWS_PER_SIZE = 2
"""One being read by slower ranks while the next is filled."""

CHUNK_NUMEL = 1 << 18
"""Elements worked on at a time, so that passes over a gradient stay in the cache."""


class _Pending:
    """A launched reduction that has not been summed yet."""

    __slots__ = ("window", "work")

    def __init__(self, window: ReduceWindow, work: Work) -> None:
        self.window = window
        self.work = work


class _KeepShard(Work):
    """An all-reduce of which only the own shard is kept (`reduce_scatter: false`)."""

    def __init__(self, work: Work, mine: Tensor, out: Tensor, accumulate: bool) -> None:
        self._work = work
        self._mine = mine
        self._out = out
        self._accumulate = accumulate

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> None:
        self._work.wait()
        if self._accumulate:
            self._out.add_(self._mine)
        else:
            self._out.copy_(self._mine)


class GradientReducer:
    """Reduces the gradients of trainable units; owns the windows, the plan and the accumulators."""

    def __init__(
        self, units: Sequence[Unit], comm: Communicator, config: ZeroConfig, *, shard_grads: bool, shard_state: bool
    ) -> None:
        self.comm = comm
        self.config = config
        self.shard_state = shard_state
        self._own_windows = shard_state and not shard_grads
        self.plan: list[Unit] = list(reversed(units))
        self.micro_batches = 0
        """Reduced since the last boundary."""
        self.divisor = config.gradient_accumulation_steps
        """Accumulation steps that the mean divides by."""
        self._accumulates = config.gradient_accumulation_steps > 1
        self._turn = 0
        self._started = False
        self._observed: list[Unit] | None = []
        self._pending: collections.deque[_Pending] = collections.deque()
        self._windows: dict[int, list[ReduceWindow]] = {}
        self._slots: dict[Unit, tuple[int, int]] = {}
        self._assign_slots()

    # -- windows -----------------------------------------------------------------------------------------------

    def _assign_slots(self) -> None:
        """Fix each unit's (key, index) of window. The key is the unit itself if it has its own, else its size."""
        counts: collections.Counter[int] = collections.Counter()
        for unit in self.plan:
            if self._own_windows:
                self._slots[unit] = (-1 - unit.layout.index, 0)
                continue
            size = unit.layout.padded_numel
            self._slots[unit] = (size * 8 + unit.storage.full.element_size(), counts[size] % WINDOWS_PER_SIZE)
            counts[size] += 1

    def _window(self, unit: Unit) -> ReduceWindow:
        """The unit's window, allocated on first use (collective: the plan makes every rank get here alike)."""
        key, index = self._slots[unit]
        windows = self._windows.setdefault(key, [])
        while len(windows) <= index:
            windows.append(
                self.comm.reduce_window(
                    unit.layout.padded_numel,
                    unit.storage.full.dtype,
                    device=unit.device,
                    label=f"gradients of {unit.layout.name}",
                )
            )
        return windows[index]

    # -- a micro-batch -----------------------------------------------------------------------------------------

    def arrived(self, unit: Unit, slot: int) -> None:
        """Autograd finished the gradient of one parameter."""
        self._started = True
        unit.arrived.add(slot)
        if not unit.complete:
            return
        if self._observed is not None and unit not in self._observed:
            self._observed.append(unit)
        while self._turn < len(self.plan) and self.plan[self._turn].complete:
            self._launch(self.plan[self._turn])
            self._turn += 1
        if self.config.overlap_comm is not False:
            self._poll()

    def flush(self, force: bool = False) -> None:
        """End the micro-batch: launch what is left, wait for everything. Nothing to do without a backward."""
        if not self._started and not force:
            return
        if not self.config.ignore_unused_parameters:
            self._refuse_unused()
        while self._turn < len(self.plan):
            self._launch(self.plan[self._turn])
            self._turn += 1
        for unit in self.plan:  # a parameter that got a second gradient after its unit was launched
            if unit.arrived:
                self._launch(unit)
        self.drain()
        self._turn = 0
        self._started = False
        self.micro_batches += 1
        self._learn_plan()

    def keep_local(self) -> None:
        """End a micro-batch under `no_sync`: add it to the unreduced fp32 sums."""
        if self._turn:
            raise ZeroStateError(
                "no_sync was entered after part of this backward had been reduced; enter it before backward"
            )
        for unit in self.plan:
            unit.collect_local()
        self._started = False

    def _refuse_unused(self) -> None:
        unused = [
            slot.name
            for unit in self.plan[self._turn :]
            for index, slot in enumerate(unit.layout.slots)
            if index not in unit.arrived
        ]
        if unused:
            raise ZeroStateError(
                f"{len(unused)} trainable parameters got no gradient, first {unused[:5]}; ignore_unused_parameters is"
                " False: use them in the loss, freeze them, or allow it"
            )

    def _launch(self, unit: Unit) -> None:
        window = self._window(unit)
        while any(pending.window is window for pending in self._pending):
            self._finish()
        if unit.grad_kind is GradKind.MEAN:
            self._promote(unit)
        window.wait_reusable()
        unit.collect(window.local)
        if unit.local is not None:
            window.local.copy_(unit.local.add_(window.local))
            unit.local = None
        self._pending.append(_Pending(window, self._reduce(unit, window)))
        if self.config.overlap_comm is False:
            self.drain()

    def _promote(self, unit: Unit) -> None:
        """A further gradient for a unit that holds a mean: back to an fp32 sum, outside the window."""
        assert unit.grad is not None
        unit.grad = unit.grad.to(torch.float32, copy=True).div_(self.scale)
        unit.grad_kind = GradKind.SUM
        self._accumulates = self._accumulates or self.micro_batches > 0  # nobody announced it; expect it from now on

    def _reduce(self, unit: Unit, window: ReduceWindow) -> Work:
        """Start the reduction into `unit.grad`: straight to the mean, or adding to the fp32 sum."""
        accumulate = unit.grad_kind is GradKind.SUM
        if not accumulate:
            unit.grad = self._gradient_buffer(unit, window)
            unit.grad_kind = GradKind.SUM if self._accumulates else GradKind.MEAN
        assert unit.grad is not None
        scale = 1.0 if unit.grad_kind is GradKind.SUM else self.scale
        bucket, label = self.config.reduce_bucket_size, unit.layout.name
        if not self.shard_state:
            return window.all_reduce(unit.grad, accumulate=accumulate, scale=scale, bucket_numel=bucket, label=label)
        if not self.config.reduce_scatter:
            whole = torch.empty(unit.layout.padded_numel, dtype=unit.grad.dtype, device=unit.device)
            work = window.all_reduce(whole, scale=scale, bucket_numel=bucket, label=label)
            return _KeepShard(work, whole[unit.start : unit.stop], unit.grad, accumulate)
        return window.reduce_scatter(unit.grad, accumulate=accumulate, scale=scale, bucket_numel=bucket, label=label)

    def _gradient_buffer(self, unit: Unit, window: ReduceWindow) -> Tensor:
        dtype = torch.float32 if self._accumulates else self.gradient_dtype(unit)
        if self._own_windows and not self._accumulates and dtype == window.local.dtype:
            return window.local[unit.start : unit.stop]
        if unit.grad is not None and unit.grad.dtype == dtype:
            return unit.grad
        return torch.empty(unit.stop - unit.start, dtype=dtype, device=unit.device)

    def _poll(self) -> None:
        while self._pending and self._pending[0].work.is_completed():
            self._finish()

    def drain(self) -> None:
        """Wait for every launched reduction."""
        while self._pending:
            self._finish()

    def _finish(self) -> None:
        self._pending.popleft().work.wait()

    def _learn_plan(self) -> None:
        """After the first micro-batch: reduce in the order in which rank 0 saw the units complete."""
        if self._observed is None:
            return
        order = dict.fromkeys(self._observed)
        order.update(dict.fromkeys(self.plan))
        position = {unit.layout.index: unit for unit in self.plan}
        indices = torch.tensor([unit.layout.index for unit in order], dtype=torch.int64, device=self.plan[0].device)
        self.comm.broadcast(indices, 0, label="reduction order")
        self.plan = [position[index] for index in indices.tolist()]
        self._observed = None
        self._assign_slots()

    # -- the boundary ------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """What the sum over ranks and micro-batches is multiplied by."""
        ranks = self.comm.size if self.config.gradient_reduction == "mean" else 1
        return 1.0 / (ranks * self.divisor)

    def gradient_dtype(self, unit: Unit) -> torch.dtype:
        """What a finished gradient is rounded to."""
        name = self.config.grad_accum_dtype
        return unit.storage.full.dtype if name is None else DTYPES[name]

    def finish_means(self) -> None:
        """Turn fp32 sums into means: scale, round once to the gradient dtype (kept in the fp32 memory)."""
        for unit in self.plan:
            if unit.grad_kind is not GradKind.SUM:
                continue
            assert unit.grad is not None
            dtype = self.gradient_dtype(unit)
            for part in unit.grad.split(CHUNK_NUMEL):
                part.mul_(self.scale)
                if dtype != torch.float32:
                    part.copy_(part.to(dtype))
            unit.grad_kind = GradKind.MEAN

    def clear(self) -> None:
        """Forget all gradients; buffers are kept."""
        self.drain()
        for unit in self.plan:
            unit.grad_kind = GradKind.EMPTY
            unit.local = None
            unit.arrived.clear()
        self.micro_batches = 0
        self._turn = 0
        self._started = False

    def close(self) -> None:
        """Give the windows back (collective)."""
        self.drain()
        for windows in self._windows.values():
            for window in windows:
                window.close()
        self._windows.clear()
