"""1F1B: one forward, one backward in turn (PipeDream-flush; Narayanan et al., arXiv:2104.04473, section 2.2).

Stage s of p runs p - 1 - s forwards ahead, then alternates. The step takes (m + p - 1)(F + B) as with GPipe, the bubble
fraction is (p - 1)/(m + p - 1), but stage s holds at most min(m, p - s) activations instead of m.
"""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["one_f_one_b"]


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """The 1F1B schedule; peak live activations of stage s are min(num_micro_batches, num_stages - s)."""
    check_sizes("1f1b", num_stages, num_micro_batches)
    actions = tuple(_stage(stage, num_stages, num_micro_batches) for stage in range(num_stages))
    peak_live = tuple(min(num_micro_batches, num_stages - stage) for stage in range(num_stages))
    return Schedule("1f1b", num_stages, num_micro_batches, 1, looped_placement(num_stages), actions, peak_live)


def _stage(stage: int, num_stages: int, num_micro_batches: int) -> tuple[Action, ...]:
    ahead = min(num_micro_batches, num_stages - 1 - stage)
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(num_micro_batches):
        if ahead + i < num_micro_batches:
            actions.append(Action("F", stage, ahead + i))
        actions.append(Action("B", stage, i))
    return tuple(actions)
