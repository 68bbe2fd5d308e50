"""Proof, before anything runs, that a schedule is whole, can run, and keeps its claim.

In order: sizes and placement fit; each stage does every kind of work once per micro-batch and chunk and nothing else;
weight gradients come in ascending micro-batches; I comes before its W and F before both; the stages' orders do not
contradict each other; the live activations of each stage reach exactly its claim; the lowered program matches every
send with a receive and does not deadlock with blocking sends.
"""

from __future__ import annotations

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule._engine import peak_live
from ds_pipe.schedule.action import Schedule
from ds_pipe.schedule.lower import Program, check_program, lower

__all__ = ["validate"]


def validate(schedule: Schedule) -> Program:
    """The program of `schedule` (`lower`), proven; ScheduleError for the first rule broken, with stage and action."""
    _check_shape(schedule)
    for stage in range(schedule.num_stages):
        _check_stage(schedule, stage)
        claim, peak = schedule.peak_live[stage], peak_live(schedule, stage)
        if peak != claim:
            raise ScheduleError(f"{schedule.name}: stage {stage} holds up to {peak} activations; it claims {claim}")
    program = lower(schedule)
    check_program(program)
    return program


def _check_shape(schedule: Schedule) -> None:
    name, num_stages = schedule.name, schedule.num_stages
    for what, found in (("actions", len(schedule.actions)), ("peak_live", len(schedule.peak_live))):
        if found != num_stages:
            raise ScheduleError(f"{name}: {what} are given for {found} stages; expected {num_stages}")
    if sorted(schedule.placement) != sorted(list(range(num_stages)) * schedule.num_chunks):
        raise ScheduleError(
            f"{name}: placement is {schedule.placement}; expected each of {num_stages} stages "
            f"{schedule.num_chunks} times"
        )


def _check_stage(schedule: Schedule, stage: int) -> None:
    """Every kind once per micro-batch and chunk, in an order that a stage can follow by itself."""
    name, num_micro, num_chunks = schedule.name, schedule.num_micro_batches, schedule.num_chunks
    kinds = "F" if schedule.forward_only else "FIW" if schedule.splits_backward else "FB"
    earlier = {"B": "F", "I": "F", "W": "I"}
    seen: dict[str, list[bytearray]] = {kind: [bytearray(num_micro) for _ in range(num_chunks)] for kind in kinds}
    next_weight = [0] * num_chunks
    for action in schedule.actions[stage]:
        kind, where, i, chunk = action
        if where != stage or kind not in kinds or not 0 <= i < num_micro or not 0 <= chunk < num_chunks:
            raise ScheduleError(
                f"{name}: {action} on stage {stage}; expected kinds {kinds}, {num_micro} micro-batches, "
                f"{num_chunks} chunks and its own stage"
            )
        if seen[kind][chunk][i]:
            raise ScheduleError(f"{name}: {action} comes twice on stage {stage}")
        seen[kind][chunk][i] = 1
        if kind != "F" and not seen[earlier[kind]][chunk][i]:
            raise ScheduleError(f"{name}: {action} comes before the {earlier[kind]} that it needs on stage {stage}")
        if kind in "BW":
            if i != next_weight[chunk]:
                raise ScheduleError(
                    f"{name}: {action} accumulates micro-batch {i} where {next_weight[chunk]} is next; weight "
                    "gradients add up in ascending order, so that sums have the bits of the unsplit model"
                )
            next_weight[chunk] += 1
    for each, rows in seen.items():
        for chunk, row in enumerate(rows):
            if 0 in row:
                at = f"micro-batch {row.index(0)}, chunk {chunk}"
                raise ScheduleError(f"{name}: stage {stage} never does {each} of {at}")
