"""GPipe: all forwards, then all backwards (Huang et al., arXiv:1811.06965).

With forward time F and backward time B on each of p stages and m micro-batches the step takes (m + p - 1)(F + B), so
the bubble fraction is (p - 1)/(m + p - 1). Every stage holds all m activations. No order of whole backwards is faster;
1F1B takes the same time with less memory. Backwards run in ascending order, unlike the paper's descending one: the
time is the same, and gradients accumulate in the order of the unsplit model.
"""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["gpipe"]


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """The GPipe schedule; peak live activations are `num_micro_batches` on every stage."""
    check_sizes("gpipe", num_stages, num_micro_batches)
    actions = tuple(
        (
            *(Action("F", stage, i) for i in range(num_micro_batches)),
            *(Action("B", stage, i) for i in range(num_micro_batches)),
        )
        for stage in range(num_stages)
    )
    peak_live = (num_micro_batches,) * num_stages
    return Schedule("gpipe", num_stages, num_micro_batches, 1, looped_placement(num_stages), actions, peak_live)
