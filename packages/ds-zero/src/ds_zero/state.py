"""What a checkpoint sees of the sharded state: segments of live memory, described by the shard map.

The runtime hands these out (`ZeroOptimizer.export_state`, `ZeroOptimizer.import_targets`) and ds_zero.checkpoint reads
from or writes into their tensors in place; neither side copies.

Vocabulary
    master   the fp32 value of a trainable parameter ("master" key); what is saved, 16-bit weights derive from it.
    param    the value of a parameter that no optimizer holds, in its own dtype ("param" key).
    other keys are the optimizer's per-element state ("exp_avg", "exp_avg_sq", ...).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ds_zero.layout import UnitLayout

__all__ = ["MASTER", "PARAM", "StateSegment"]

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

    @property
    def stop(self) -> int:
        return self.start + self.numel
