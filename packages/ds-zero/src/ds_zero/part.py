"""`ModelPart`: what `shard()` must know of a model that is one part of a larger one, such as a pipeline stage.

    stage, optimizer = ds_zero.shard(stage, torch_optimizer, group=data_group, part=ModelPart(communicator(pipe_group)))

Each part is sharded over its own data-parallel ranks. What the parts must do together is little: the gradient norm is
the whole model's, a step is skipped on all of them or on none, and an error names the first parameter concerned of
all. Two things are left to whoever drives the parts: the loss is scaled where it arises (`ZeroOptimizer.scale`), and
the gradient of a *duplicate*, a parameter that several parts hold and keep equal, is summed over them (`stage`) before
the step.

Invariants: every part takes the same number of steps and micro-batches; a part may hold no parameter at all, and still
takes part; the duplicates of a parameter are counted, saved and named by one of the parts only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ds_comm import Communicator

__all__ = ["ModelPart"]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelPart:
    """This rank's part of a model.

    Attributes:
        comm: over one rank of each part, in the order of the parts; every rank of a part has such a group of its own.
        duplicates: parameters here that another part counts in the norm and saves.
        lanes: the parameters of each chunk of this part, if it has several, whose gradients arrive at different times:
            each chunk's micro-batches are ended by `ZeroOptimizer.reducer.end_lane(chunk)`. A parameter of several
            chunks arrives with the first of them.
    """

    comm: Communicator
    duplicates: Sequence[nn.Parameter] = ()
    lanes: Sequence[Sequence[nn.Parameter]] = ()

    def lane_of(self, parameter: nn.Parameter) -> int:
        """The number of the first lane that has it (0 without lanes)."""
        return next((at for at, lane in enumerate(self.lanes) if any(parameter is p for p in lane)), 0)
