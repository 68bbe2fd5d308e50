"""The five learning rate schedules of DeepSpeed, as closed forms of the number of steps taken.

Vocabulary: t = `last_batch_iteration`, -1 before the first `step()`, 0 after it. A schedule computes the learning
rate of every parameter group from t alone, so resuming needs t only. Bounds may be one number for all groups or a
list with one per group; groups never share a value by accident.

Invariants
- Building a schedule at t = -1 writes the starting learning rate into the groups; at t >= 0 (resuming) it leaves
  them alone.
- A group's lr that is a tensor is filled in place (fused and captured optimizers hold on to it).
- `get_last_lr()` is an AssertionError ("need to call step() first") until a step was taken: clients tell warm-up by
  that text.

Sources: LRRangeTest and OneCycle from L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017) and
"A Disciplined Approach to Neural Network Hyper-Parameters" (2018); cosine decay from I. Loshchilov and F. Hutter,
"SGDR" (2017).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from deepspeed._lr_base import Schedule, get_torch_optimizer, update_lr
from deepspeed._lr_cyclic import LRRangeTest, OneCycle
from deepspeed._lr_warmup import WARMUP_LINEAR_RATE, WARMUP_LOG_RATE, WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "LR_RANGE_TEST",
    "ONE_CYCLE",
    "VALID_LR_SCHEDULES",
    "WARMUP_COSINE_LR",
    "WARMUP_DECAY_LR",
    "WARMUP_LINEAR_RATE",
    "WARMUP_LOG_RATE",
    "WARMUP_LR",
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "get_torch_optimizer",
    "make_schedule",
    "update_lr",
]

LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

_SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def make_schedule(name: str, optimizer: Any, params: dict[str, Any]) -> Any:
    """The schedule of a `scheduler` section: one of the five, or a class of torch.optim.lr_scheduler, built as
    `cls(optimizer, **params)`.

    Raises ValueError naming the schedule and its parameters when they do not fit its signature.
    """
    cls = _SCHEDULES[name] if name in _SCHEDULES else getattr(torch.optim.lr_scheduler, name, None)
    if not callable(cls):
        raise ValueError(
            f"there is no schedule {name!r}; known: {', '.join(VALID_LR_SCHEDULES)} and the classes of "
            "torch.optim.lr_scheduler"
        )
    try:
        inspect.signature(cls).bind(optimizer, **params)
    except TypeError as error:
        raise ValueError(
            f"scheduler {name}: {error}; its parameters are {inspect.signature(cls)}, given were {sorted(params)}"
        ) from None
    return cls(optimizer, **params)
