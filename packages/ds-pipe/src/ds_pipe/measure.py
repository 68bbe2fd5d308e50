"""What a pipeline really does: one train_batch on the clock, and the bytes that activations hold.

`measure_run` gives a `Measured` run, to be drawn over its plan (`to_svg(plan, run)`) or turned into costs
(`Costs.from_measured`). `measure_memory` counts what micro-batches keep alive between their actions: storages made (or
received) in an action of a chunk and still alive at its end, gradients kept for W included, weights and their `.grad`
not. What an operation needs for itself while it runs is not in it.

The plan's prediction is `simulate(schedule, costs).peak_activation` with, as `costs.activation`, the most that one
micro-batch was seen to hold of each virtual stage.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ds_comm
from ds_pipe.schedule.action import Action
from ds_pipe.schedule.simulate import Costs, Measured, simulate

if TYPE_CHECKING:
    from ds_pipe.executor import Pipeline

__all__ = ["Memory", "measure_memory", "measure_run"]


def measure_run(
    pipe: Pipeline, data_iter: Iterator[Any] | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Measured:
    """Run `pipe.train_batch(data_iter, optimizer)` on the clock; what each stage did when, on every stage (seconds).

    Waiting for messages is not in an action's time. Ranks of one host share its clock; over several hosts each counts
    from a barrier.
    """
    spans: list[tuple[tuple[Any, ...], float, float]] = []

    def observe(action: Action, start: float, end: float) -> None:
        spans.append((tuple(action), start, end))

    ds_comm.barrier(group=pipe.group)
    zero = perf_counter()
    pipe.observers.append(observe)
    try:
        pipe.train_batch(data_iter, optimizer)
    finally:
        pipe.observers.remove(observe)
    reports = _from_all(pipe, (socket.gethostname(), zero, spans))
    one_host = len({host for host, _, _ in reports}) == 1
    stages = []
    for _, theirs, listed in reports:
        origin = reports[0][1] if one_host else theirs
        stages.append([(Action(*action), start - origin, end - origin) for action, start, end in listed])
    return Measured.of(pipe.schedule.name, stages)


class Memory(NamedTuple):
    """Bytes: what one micro-batch holds at most, per virtual stage; the peak per stage, and the plan's prediction."""

    activation: tuple[int, ...]
    peak: tuple[int, ...]
    predicted: tuple[int, ...]


def measure_memory(
    pipe: Pipeline, data_iter: Iterator[Any] | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Memory:
    """Run `pipe.train_batch(data_iter, optimizer)`, slowly, and say what its activations held, on every stage."""
    meter = _Meter(pipe.schedule.num_chunks, pipe.model)
    with pipe.watched(meter.around):
        pipe.train_batch(data_iter, optimizer)
    reports = _from_all(pipe, (meter.peak, meter.largest))
    schedule = pipe.schedule
    activation = [0] * schedule.num_virtual_stages
    for virtuals, (_, largest) in zip(schedule.chunks, reports, strict=True):
        for virtual, nbytes in zip(virtuals, largest, strict=True):
            activation[virtual] = nbytes
    ones = (1,) * schedule.num_virtual_stages
    plan = simulate(schedule, Costs(ones, ones, ones, activation=tuple(activation)))
    predicted = tuple(int(peak) for peak in plan.peak_activation)
    return Memory(tuple(activation), tuple(peak for peak, _ in reports), predicted)


def _from_all(pipe: Pipeline, mine: Any) -> list[Any]:
    found: list[Any] = [None] * pipe.num_stages
    ds_comm.all_gather_object(found, mine, group=pipe.group, label="measurements")
    return found


class _Meter(TorchDispatchMode):
    """Bytes of storages by the (chunk, micro-batch) that holds them; entered for each action."""

    def __init__(self, num_chunks: int, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self.peak = 0
        self.largest = [0] * num_chunks
        self._held: dict[tuple[int, int], dict[int, int]] = {}  # bytes by storage
        self._owner: tuple[int, int] = (0, 0)

    @contextmanager
    def around(self, action: Action, payload: Any) -> Iterator[None]:
        owner = self._owner = (action.chunk, action.micro_batch)
        self._held.setdefault(owner, {})
        if action.kind == "F":
            self._note(payload)
        with self:
            yield
        if action.kind in "BW":
            del self._held[owner]
            return
        if action.kind == "I":  # one that runs with its W delivers at once
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    self._held[owner].pop(parameter.grad.untyped_storage()._cdata, None)
        self.largest[action.chunk] = max(self.largest[action.chunk], sum(self._held[owner].values()))
        self.peak = max(self.peak, sum(sum(held.values()) for held in self._held.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self._note(result, before)
        return result

    def _note(self, value: Any, known: Collection[int] = ()) -> None:
        """Storages that are new belong to the action at hand until they die, or its B or W is over."""
        held = self._held[self._owner]
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in held:
                    held[key] = storage.nbytes()
                    weakref.finalize(storage, held.pop, key, None)
