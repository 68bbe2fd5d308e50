"""Gradients on their way: from `param.grad` through a reduce window into the unit's mean gradient.

One micro-batch reduces every trainable unit exactly once, in an order that all ranks agree on (the *plan*): first the
reverse of the units, later the order in which rank 0 saw them complete. A unit is launched when it is complete and
all units before it in the plan have been launched; what is left when the micro-batch ends is launched by `flush` with
zeros for missing gradients. So the set and order of collectives depends on the plan alone, never on hooks that fire.

Lanes
    The chunks of a pipeline stage are at different micro-batches at a time. Each is a lane with units and a plan of its
    own, whose micro-batches `end_lane` ends; without a pipeline there is one lane, which `flush` ends.

Buckets
    A unit travels in one or more buckets of at most `reduce_bucket_size` elements, each one collective. A bucket is a
    range of columns of the unit's flat seen as a table with one row per shard (one row in all at stage 0), so what a
    rank keeps of it is contiguous. The full gradient of the model never exists: stage 1 needs no more memory for
    gradients than stage 2.
Sums over ranks are in rank order with fp32 accumulation, and each micro-batch is added to the fp32 accumulator in
order: one rank that accumulates N micro-batches gives the same bits as N ranks with one each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_comm import Communicator, ReduceWindow, Work
from ds_zero._flat import FlatMemory
from ds_zero._unit import GradKind, Unit
from ds_zero._windows import WindowRing
from ds_zero.buckets import bucket_limit, bucket_ranges, ring_depth
from ds_zero.config import ZeroConfig
from ds_zero.errors import ZeroStateError
from ds_zero.precision import DTYPES

__all__ = ["GradientReducer"]

CHUNK_NUMEL = 1 << 18
"""Elements worked on at a time, so that passes over a gradient stay in the cache."""


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


@dataclasses.dataclass(eq=False)
class _Lane:
    """Units that are at the same micro-batch. `plan[:turn]` have been launched in it; `started`: it has a gradient."""

    plan: list[Unit]
    turn: int = 0
    started: bool = False
    observed: list[Unit] | None = dataclasses.field(default_factory=list)
    """Units in the order in which the first micro-batch completes them; None afterwards."""


class GradientReducer:
    """Reduces the gradients of trainable units; owns the windows, the plans and the accumulators.

    `units` are those of each lane.
    """

    def __init__(
        self, units: Sequence[Sequence[Unit]], comm: Communicator, config: ZeroConfig, *, shard_state: bool
    ) -> None:
        self.comm = comm
        self.config = config
        self.shard_state = shard_state
        self._lanes = [_Lane(list(reversed(members))) for members in units]
        self._lane_of = {unit: lane for lane in self._lanes for unit in lane.plan}
        self.micro_batches = 0
        """Reduced since the last boundary."""
        self.divisor = config.gradient_accumulation_steps
        """Accumulation steps that the mean divides by."""
        self._accumulates = config.gradient_accumulation_steps > 1
        self._ring = WindowRing(comm, ring_depth(comm.kind))
        self._memory = self._gradient_memory()

    # -- a micro-batch -----------------------------------------------------------------------------------------

    def announce(self, num_micro_batches: int) -> None:
        """The step to come has so many micro-batches. ZeroStateError when part of it has been reduced already."""
        if self.micro_batches:
            raise ZeroStateError(
                f"a step of {num_micro_batches} micro-batches is announced, but {self.micro_batches} have been reduced"
                " since the last one; call step() or zero_grad() first"
            )
        self.divisor = num_micro_batches
        self._accumulates = num_micro_batches > 1

    @property
    def plan(self) -> list[Unit]:
        """All units, in the order of reduction within each lane."""
        return [unit for lane in self._lanes for unit in lane.plan]

    def arrived(self, unit: Unit, slot: int) -> None:
        """Autograd finished the gradient of one parameter."""
        lane = self._lane_of[unit]
        lane.started = True
        unit.arrived.add(slot)
        if not unit.complete:
            return
        if lane.observed is not None and unit not in lane.observed:
            lane.observed.append(unit)
        while lane.turn < len(lane.plan) and lane.plan[lane.turn].complete:
            self._launch(lane.plan[lane.turn])
            lane.turn += 1
        if self.config.overlap_comm is not False:
            self._ring.poll()

    def flush(self, force: bool = False, kept: bool = False) -> None:
        """End the micro-batch: launch what is left, wait for everything. Nothing to do without a backward.

        With several lanes each has been ended already, and the micro-batch is only counted.
        """
        if len(self._lanes) == 1:
            if not force and not self._lanes[0].started:
                return
            self.end_lane(0, kept=kept)
        elif not force:
            return
        self.micro_batches += 1

    def end_lane(self, index: int, *, kept: bool = False) -> None:
        """End the micro-batch of one lane: launch what is left of it, wait for everything."""
        lane = self._lanes[index]
        if not self.config.ignore_unused_parameters and not kept:
            self._refuse_unused(lane)
        self._launch_rest(lane)
        self._learn_plan(lane)

    def _launch_rest(self, lane: _Lane) -> None:
        while lane.turn < len(lane.plan):
            self._launch(lane.plan[lane.turn])
            lane.turn += 1
        for unit in lane.plan:  # a parameter that got a second gradient after its unit was launched
            if unit.arrived:
                self._launch(unit)
        self._ring.drain()
        lane.turn = 0
        lane.started = False

    def keep_local(self) -> None:
        """End a micro-batch under `no_sync`: add it to the unreduced fp32 sums."""
        if any(lane.turn for lane in self._lanes):
            raise ZeroStateError(
                "no_sync was entered after part of this backward had been reduced; enter it before backward"
            )
        for unit in self.plan:
            unit.collect_local()
        for lane in self._lanes:
            lane.started = False

    def _refuse_unused(self, lane: _Lane) -> None:
        unused = [
            slot.name
            for unit in lane.plan[lane.turn :]
            for index, slot in enumerate(unit.layout.slots)
            if index not in unit.arrived
        ]
        if unused:
            raise ZeroStateError(
                f"{len(unused)} trainable parameters got no gradient, first {unused[:5]}; ignore_unused_parameters is"
                " False: use them in the loss, freeze them, or allow it"
            )

    def _launch(self, unit: Unit) -> None:
        """Start reducing a unit, bucket by bucket, into `unit.grad`: straight to the mean, or onto the fp32 sum."""
        if unit.grad_kind is GradKind.MEAN:
            self._promote(unit)
        accumulate = unit.grad_kind is GradKind.SUM
        if not accumulate:
            unit.grad_kind = GradKind.SUM if self._accumulates else GradKind.MEAN
        scale = 1.0 if unit.grad_kind is GradKind.SUM else self.scale
        unit.densify()
        if not accumulate and self._is_sum_of_one(unit, scale):
            op = "reduce_scatter" if self.shard_state and self.config.reduce_scatter else "all_reduce"
            for columns in self._buckets(unit):
                self.comm.enter(op, unit.storage.full.dtype, columns.stop - columns.start, unit.layout.name)
            unit.keep_loose()
            return
        if not accumulate:
            unit.grad = self._gradient_buffer(unit)
        for columns in self._buckets(unit):
            assert unit.grad is not None
            width = columns.stop - columns.start
            window = self._ring.take(width * unit.num_rows, unit.storage.full.dtype, unit.device)
            unit.collect(window.local, columns)
            self._ring.started(window, self._reduce(unit, window, unit.grad[columns], accumulate, scale))
            if self.config.overlap_comm is False:
                self._ring.drain()
        unit.collected()

    def _is_sum_of_one(self, unit: Unit, scale: float) -> bool:
        """Whether the first gradient of a unit needs no arithmetic: one rank, nothing kept, no rounding, no scaling."""
        same = self._buffer_dtype(unit) == unit.storage.full.dtype
        return self.comm.kind == "local" and unit.local is None and scale == 1.0 and same

    def _buckets(self, unit: Unit) -> Iterator[slice]:
        """The columns of each bucket."""
        limit = bucket_limit(self.comm.kind, self.config.reduce_bucket_size)
        return bucket_ranges(unit.layout, unit.num_rows, limit)

    def _promote(self, unit: Unit) -> None:
        """A further gradient for a unit that holds a mean: back to an fp32 sum."""
        assert unit.grad is not None
        unit.grad = unit.grad.to(torch.float32, copy=True).div_(self.scale)
        unit.grad_kind = GradKind.SUM
        self._accumulates = self._accumulates or self.micro_batches > 0  # nobody announced it; expect it from now on

    def _reduce(self, unit: Unit, window: ReduceWindow, out: Tensor, accumulate: bool, scale: float) -> Work:
        label = unit.layout.name
        if not self.shard_state:
            return window.all_reduce(out, accumulate=accumulate, scale=scale, label=label)
        if not self.config.reduce_scatter:
            whole = torch.empty(window.local.numel(), dtype=out.dtype, device=unit.device)
            work = window.all_reduce(whole, scale=scale, label=label)
            return _KeepShard(work, whole.view(self.comm.size, -1)[self.comm.rank], out, accumulate)
        return window.reduce_scatter(out, accumulate=accumulate, scale=scale, label=label)

    def _gradient_buffer(self, unit: Unit) -> Tensor:
        return self._memory.take(unit.stop - unit.start, self._buffer_dtype(unit), unit.device)

    def _gradient_memory(self) -> FlatMemory:
        return FlatMemory(unit.stop - unit.start for unit in self.plan)

    def _buffer_dtype(self, unit: Unit) -> torch.dtype:
        return torch.float32 if self._accumulates else self.gradient_dtype(unit)

    def _learn_plan(self, lane: _Lane) -> None:
        """After the first micro-batch: reduce in the order in which rank 0 saw the units complete."""
        if lane.observed is None or not lane.plan:
            return
        order = dict.fromkeys(lane.observed)
        order.update(dict.fromkeys(lane.plan))
        position = {unit.layout.index: unit for unit in lane.plan}
        indices = torch.tensor([unit.layout.index for unit in order], dtype=torch.int64, device=lane.plan[0].device)
        self.comm.broadcast(indices, 0, label="reduction order")
        lane.plan = [position[index] for index in indices.tolist()]
        lane.observed = None

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
        """Forget all gradients. A backward that was not ended is ended first: other ranks may be further in it."""
        for lane in self._lanes:
            if lane.started:
                self._launch_rest(lane)
            lane.turn = 0
        self._ring.drain()
        for unit in self.plan:
            unit.grad_kind = GradKind.EMPTY
            unit.grad = None  # the next forward's activations may have the memory
            unit.local = None
            unit.arrived.clear()
        self._memory = self._gradient_memory()
        self.micro_batches = 0

    def close(self) -> None:
        """Give the windows back."""
        self._ring.close()
