"""Forward only: what evaluation and generation run.

Each stage does its forwards in order; the step takes m + p - 1 forwards, and an activation lives only as long as its
own forward, so one is live at a time.
"""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["inference"]


def inference(num_stages: int, num_micro_batches: int) -> Schedule:
    """The forward-only schedule; peak live activations are 1 on every stage."""
    check_sizes("inference", num_stages, num_micro_batches)
    actions = tuple(tuple(Action("F", stage, i) for i in range(num_micro_batches)) for stage in range(num_stages))
    placement = looped_placement(num_stages)
    return Schedule("inference", num_stages, num_micro_batches, 1, placement, actions, (1,) * num_stages)
