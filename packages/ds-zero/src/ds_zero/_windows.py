"""The ring of reduce windows, and the reductions under way in them.

Windows are kept by (elements, dtype), `depth` of each, used in turn. Taking one finishes the reduction that last used
it, and waits until every rank has read it. Since all ranks take windows in the same order (the plan), a window is the
same piece of the ring on every rank, and a rank can be `depth` buckets ahead of the slowest before it waits.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from ds_comm import Communicator, ReduceWindow, Work

__all__ = ["WindowRing"]


@dataclasses.dataclass
class _Slot:
    window: ReduceWindow
    work: Work | None = None


class WindowRing:
    """Owns the windows of one reducer."""

    def __init__(self, comm: Communicator, depth: int) -> None:
        self._comm = comm
        self._depth = depth
        self._rings: dict[tuple[int, torch.dtype], collections.deque[_Slot]] = {}
        self._under_way: collections.deque[_Slot] = collections.deque()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> ReduceWindow:
        """A window of `numel` elements that may be written now (collective when it is made)."""
        ring = self._rings.setdefault((numel, dtype), collections.deque())
        if len(ring) < self._depth:
            window = self._comm.reduce_window(numel, dtype, device=device, label=f"gradient window of {numel} {dtype}")
            ring.append(_Slot(window))
        else:
            ring.rotate(-1)
            while ring[-1].work is not None:
                self._finish_oldest()
            ring[-1].window.wait_reusable()
        return ring[-1].window

    def started(self, window: ReduceWindow, work: Work) -> None:
        """A reduction of the window taken last has been started."""
        slot = next(slot for ring in self._rings.values() for slot in ring if slot.window is window)
        slot.work = work
        self._under_way.append(slot)

    def poll(self) -> None:
        """Finish those reductions that need no waiting."""
        while self._under_way and (work := self._under_way[0].work) is not None and work.is_completed():
            self._finish_oldest()

    def drain(self) -> None:
        """Finish every reduction under way."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        slot = self._under_way.popleft()
        assert slot.work is not None
        slot.work.wait()
        slot.work = None

    def close(self) -> None:
        """Give the windows back."""
        self.drain()
        for ring in self._rings.values():
            for slot in ring:
                slot.window.close()
        self._rings.clear()
