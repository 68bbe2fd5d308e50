"""A trace of training steps for Perfetto and chrome://tracing: compute by unit, every collective, all ranks.

    with trace_steps(engine, "trace.json"):
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

Each rank is a process of the trace with four rows:
    phases         forward, backward and step of the engine
    units          each unit's forward and backward; a unit's backward runs from the arrival of its outputs' gradients
                   to that of the next unit's
    communication  the time that this rank spent in a collective and in waiting for it, by op and unit
    calls          the moment at which a collective was entered; one that costs nothing (a gather in shared memory) has
                   no stretch in the row above

Times are those of the host; on an accelerator, `synchronize=True` makes them the device's, at the price of overlap.
Nothing is recorded outside of the block, and training inside computes the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ds_comm
import ds_comm.device
from ds_zero.blocks import find_blocks

__all__ = ["trace_steps"]

_ROWS = ("phases", "units", "communication", "calls")


class _Recorder:
    """The events of one rank, in the trace's own form."""

    def __init__(self, rank: int, synchronize: bool) -> None:
        self.events: list[dict[str, Any]] = []
        self._rank = rank
        self._synchronize = synchronize
        self._origin = time.time() - time.perf_counter()
        """Turns the host's steady clock into one that all hosts share."""

    def now(self) -> float:
        """The steady clock, in seconds."""
        if self._synchronize:
            ds_comm.device.synchronize()
        return time.perf_counter()

    def span(self, row: str, name: str, begin: float, end: float, **details: Any) -> None:
        """Something that took from `begin` to `end`."""
        self._add(row, name, begin, ph="X", dur=(end - begin) * 1e6, args=details)

    def moment(self, row: str, name: str, at: float, **details: Any) -> None:
        """Something that happened at one time."""
        self._add(row, name, at, ph="i", s="t", args=details)

    def _add(self, row: str, name: str, at: float, **rest: Any) -> None:
        stamp = {"pid": self._rank, "tid": _ROWS.index(row), "ts": (self._origin + at) * 1e6}
        self.events.append({"name": name, **stamp, **rest})


class _UnitSpans:
    """Hooks that note when each unit's modules run."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._begun: list[float] = []
        self._backward: tuple[str, float] | None = None
        self._handles: list[Any] = []
        for block in find_blocks(model):
            for owner in block.owners:
                self._handles.append(owner.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(owner.register_forward_hook(self._leave(block.name), always_call=True))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._begun.append(self._recorder.now())

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._begun:  # recording began inside this forward
                return
            again = torch._C._current_graph_task_id() != -1
            text = f"{'recompute' if again else 'forward'} {name}"
            self._recorder.span("units", text, self._begun.pop(), self._recorder.now())
            outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
            if outputs and not again:
                torch.autograd.graph.register_multi_grad_hook(outputs, lambda _: self._arrived(name), mode="any")

        return leave

    def _arrived(self, name: str) -> None:
        self.end_backward()
        self._backward = (name, self._recorder.now())

    def end_backward(self) -> None:
        """The unit whose backward runs is done."""
        if self._backward is not None:
            name, begin = self._backward
            self._recorder.span("units", f"backward {name}", begin, self._recorder.now())
            self._backward = None

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def _phase(recorder: _Recorder, owner: Any, method: str, after: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, calls of `owner.method` are spans of the row "phases"."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = recorder.now()
        try:
            return original(*args, **kwargs)
        finally:
            if after is not None:
                after()
            recorder.span("phases", method, begin, recorder.now())

    owner.__dict__[method] = call
    try:
        yield
    finally:
        del owner.__dict__[method]


@contextlib.contextmanager
def trace_steps(engine: Any, path: str | os.PathLike[str], *, synchronize: bool = False) -> Iterator[None]:
    """Record what the engine does inside the block, and write it to `path` on rank 0; collective.

    Args:
        engine: a DeepSpeedEngine or PipelineEngine. path: a JSON file for https://ui.perfetto.dev or chrome://tracing.
        synchronize: wait for the device at every boundary, so that times are the device's.
    """
    rank = ds_comm.get_rank()
    recorder = _Recorder(rank, synchronize)
    ledgers = {id(c.ledger): c.ledger for c in (engine.sharded.comm, ds_comm.communicator())}
    noted: list[Any] = []
    units = _UnitSpans(engine.module, recorder)
    pipeline = hasattr(engine, "train_batch")
    with contextlib.ExitStack() as stack:
        stack.callback(units.close)
        if pipeline:
            stack.enter_context(_phase(recorder, engine, "train_batch", units.end_backward))
        else:
            stack.enter_context(_phase(recorder, engine, "forward"))
            stack.enter_context(_phase(recorder, engine, "backward", units.end_backward))
            stack.enter_context(_phase(recorder, engine, "step"))
        for ledger in ledgers.values():
            before, ledger.events = ledger.events, noted
            stack.callback(setattr, ledger, "events", before)
        yield
    for entry, begin, end in noted:
        details = {"elements": entry.numel, "bytes": entry.nbytes, "dtype": str(entry.dtype)}
        name = f"{entry.op} {entry.label}".strip()
        if end > begin:
            recorder.span("communication", name, begin, end, **details)
        else:
            recorder.moment("calls", name, begin, **details)
    _write(recorder, rank, Path(path))


def _write(recorder: _Recorder, rank: int, path: Path) -> None:
    everyone: list[Any] = [None] * ds_comm.get_world_size()
    ds_comm.all_gather_object(everyone, recorder.events)
    if rank != 0:
        return
    start = min((event["ts"] for events in everyone for event in events), default=0.0)
    merged: list[dict[str, Any]] = []
    for peer, events in enumerate(everyone):
        merged.append({"name": "process_name", "ph": "M", "pid": peer, "args": {"name": f"rank {peer}"}})
        merged += [
            {"name": "thread_name", "ph": "M", "pid": peer, "tid": row, "args": {"name": name}}
            for row, name in enumerate(_ROWS)
        ]
        merged += [{**event, "ts": event["ts"] - start} for event in sorted(events, key=lambda event: event["ts"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": merged, "displayTimeUnit": "ms"}), encoding="utf-8")
