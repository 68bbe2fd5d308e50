"""ZB-H1: backward split into I (input gradient) and W (weight gradient) that fills gaps (arXiv:2401.10241, section 3).

With F = I = W = 1 the step takes max(3m + p - 1, 2m + 2p - 1): a bubble fraction of (p - 1)/(3m + p - 1) from m = p
micro-batches on, a third of 1F1B's, because only an I and not a whole backward stands between a stage and the next.
A single step cannot be shorter than that whatever the memory, as the last stage starts p - 1 late and works 3m. It
keeps 1F1B's largest memory, p activations, but needs it on every stage: stage s does its W s micro-batches late.
"""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["zb_h1"]


def zb_h1(num_stages: int, num_micro_batches: int) -> Schedule:
    """The ZB-H1 schedule; peak live activations are min(num_micro_batches, num_stages) on every stage."""
    check_sizes("zb_h1", num_stages, num_micro_batches)
    actions = tuple(_stage(stage, num_stages, num_micro_batches) for stage in range(num_stages))
    peak_live = (min(num_micro_batches, num_stages),) * num_stages
    return Schedule("zb_h1", num_stages, num_micro_batches, 1, looped_placement(num_stages), actions, peak_live)


def _stage(stage: int, num_stages: int, num_micro_batches: int) -> tuple[Action, ...]:
    """p - s forwards ahead, then I, W and F in turn, the W s micro-batches late."""
    ahead = min(num_micro_batches, num_stages - stage)
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(num_micro_batches):
        actions.append(Action("I", stage, i))
        if i >= stage:
            actions.append(Action("W", stage, i - stage))
        if ahead + i < num_micro_batches:
            actions.append(Action("F", stage, ahead + i))
    actions += [Action("W", stage, i) for i in range(max(0, num_micro_batches - stage), num_micro_batches)]
    return tuple(actions)
