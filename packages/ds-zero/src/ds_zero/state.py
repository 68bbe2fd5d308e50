"""What a checkpoint sees of the sharded state: segments of live memory, described by the shard map.

The runtime hands these out (`ZeroOptimizer.export_state`, `ZeroOptimizer.import_targets`) and ds_zero.checkpoint reads
from or writes into their tensors in place; neither side copies.

Vocabulary
    master   the fp32 value of a trainable parameter ("master" key); what is saved, 16-bit weights derive from it.
    param    the value of a parameter that no optimizer holds, in its own dtype ("param" key).
    other keys are the optimizer's per-element state ("exp_avg", "exp_avg_sq", ...).
    gate     whoever writes masters or optimizer state passes it first; a checkpoint that still reads them closes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ds_zero.layout import UnitLayout

__all__ = ["MASTER", "PARAM", "StateSegment", "UpdateGate"]

MASTER = "master"
PARAM = "param"


@dataclasses.dataclass
class StateSegment:
    """Elements `[start, start + numel)` of a unit's flat buffer, all of one optimizer group.

    `tensors[key]` is 1-D with `numel` elements and aliases the live state. `scalars` are the optimizer's
    per-parameter numbers ("step"), equal for all elements of the segment.
    """

    unit: UnitLayout
    group: int
    start: int
    numel: int
    tensors: dict[str, Tensor]
    scalars: dict[str, float]
    private: frozenset[str] = frozenset()
    """Keys whose tensors are written by nobody who does not pass the gate: no parameter shares their memory."""

    @property
    def stop(self) -> int:
        return self.start + self.numel


class UpdateGate:
    """Between the readers of masters and optimizer state and those who are about to write them. One thread's own."""

    def __init__(self) -> None:
        self._readers: list[Callable[[], None]] = []

    def hold(self, finish: Callable[[], None]) -> None:
        """Close the gate; `finish()` returns when the reader has read everything."""
        self._readers.append(finish)

    def wait(self) -> None:
        """Pass the gate: every reader has finished."""
        while self._readers:
            self._readers[0]()
            self._readers.pop(0)  # not before: a signal during the wait must leave the gate closed
