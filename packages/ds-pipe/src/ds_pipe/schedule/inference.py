"""Forward only: what evaluation and generation run.

With one chunk each stage does its forwards in order and the step takes m + p - 1 forwards. With several, all stages are
played in unit time and each does, of the forwards whose input is there, the one furthest down the model. An activation
lives only as long as its own forward, so one is live at a time.
"""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["inference"]


def inference(
    num_stages: int, num_micro_batches: int, num_chunks: int = 1, placement: tuple[int, ...] | None = None
) -> Schedule:
    """The forward-only schedule; peak live activations are 1 on every stage.

    `placement` (default: `num_chunks` chunks in a loop) is the stage of each virtual stage.
    """
    check_sizes("inference", num_stages, num_micro_batches)
    placement = placement or looped_placement(num_stages, num_chunks)
    held = [[k for k, stage in enumerate(placement) if stage == mine] for mine in range(num_stages)]
    done = [0] * len(placement)
    actions: list[list[Action]] = [[] for _ in range(num_stages)]
    while done[-1] < num_micro_batches:
        before = [num_micro_batches, *done]  # before[k] micro-batches have come as far as the input of k
        for stage, virtuals in enumerate(held):
            ready = [k for k in virtuals if done[k] < before[k]]
            if ready:
                actions[stage].append(Action("F", stage, done[ready[-1]], virtuals.index(ready[-1])))
                done[ready[-1]] += 1
    frozen = tuple(map(tuple, actions))
    return Schedule("inference", num_stages, num_micro_batches, num_chunks, placement, frozen, (1,) * num_stages)
