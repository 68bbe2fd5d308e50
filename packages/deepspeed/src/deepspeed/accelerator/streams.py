"""Streams, events, graphs and profiler ranges of a device; on a CPU each does nothing and is a usable object."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deepspeed.accelerator.topic import Topic


class StreamTopic(Topic):
    """Order of work on the device."""

    @property
    def Stream(self) -> Any:
        """Class of streams; None on a CPU."""
        return None if self._name == "cpu" else self.module.Stream

    @property
    def Event(self) -> Any:
        """Class of events; None on a CPU."""
        return None if self._name == "cpu" else self.module.Event

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Context in which work goes to `stream`."""
        context: AbstractContextManager[Any] = nullcontext() if self._name == "cpu" else self.module.stream(stream)
        return context

    def current_stream(self, device_index: int | None = None) -> Any:
        """Stream that work goes to now; None on a CPU."""
        return None if self._name == "cpu" else self.module.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        """Stream that work goes to when nothing else is said; None on a CPU."""
        return None if self._name == "cpu" else self.module.default_stream(device_index)

    def create_graph(self) -> Any:
        """An empty graph; None where the device has none."""
        graph = getattr(self.module, "CUDAGraph", None)
        return graph() if graph is not None else None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> AbstractContextManager[Any]:
        """Context that records work into `graph` instead of doing it; where there are no graphs it is done."""
        capture = getattr(self.module, "graph", None)
        context: AbstractContextManager[Any] = capture(graph, pool, stream) if capture is not None else nullcontext()
        return context

    def replay_graph(self, graph: Any) -> None:
        """Do the recorded work."""
        if graph is not None:
            graph.replay()

    def _nvtx(self) -> Any:
        return getattr(self.module, "nvtx", None) if self._name != "cpu" else None

    def range_push(self, msg: str) -> Any:
        """Begin a named range in the device's profile."""
        nvtx = self._nvtx()
        return nvtx.range_push(msg) if nvtx is not None else None

    def range_pop(self) -> Any:
        """End the innermost range."""
        nvtx = self._nvtx()
        return nvtx.range_pop() if nvtx is not None else None

    def amp(self) -> Any:
        """torch's autocast module of the device type."""
        return getattr(self.module, "amp", torch.amp)
