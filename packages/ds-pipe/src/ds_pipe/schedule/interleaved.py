"""Interleaved 1F1B: each stage holds v chunks of the model (Narayanan et al., arXiv:2104.04473, section 2.2).

Micro-batches go in rounds: a round's micro-batches all pass chunk 0, then all pass chunk 1, and so on; backwards the
same with the chunks reversed. Stage s runs 2(p - 1 - s) + (v - 1)g chunk forwards ahead, g the size of the round, then
alternates. With chunk times f and b the step takes (vm + p - 1)(f + b): bubble fraction (p - 1)/(vm + p - 1), for v
times as many messages and more live activations.

The paper needs m to be a multiple of p. Here a round has at least p micro-batches and m is dealt to max(1, m // p)
rounds as evenly as it goes (larger ones first), so any m >= p keeps the formula exactly; it costs the memory of the
larger rounds. Fewer micro-batches than stages would leave the ring of stages idle between chunks: an error.
"""

from __future__ import annotations

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.action import Action, Schedule, check_sizes, looped_placement

__all__ = ["interleaved"]


def interleaved(num_stages: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """The interleaved 1F1B schedule with `num_chunks` (v >= 2) chunks per stage.

    Peak live chunk activations of stage s: min(v m, 2(p - 1 - s) + (v - 1) g + 1) with g = ceil(m / (m // p)).
    ScheduleError for fewer than 2 chunks or fewer micro-batches than stages.
    """
    check_sizes("interleaved", num_stages, num_micro_batches)
    if num_chunks < 2:
        raise ScheduleError(f"interleaved: num_chunks is {num_chunks}; expected at least 2 (1f1b is the one with 1)")
    if num_micro_batches < num_stages:
        raise ScheduleError(
            f"interleaved: {num_micro_batches} micro-batches for {num_stages} stages; a round needs at least as many "
            "micro-batches as stages: raise gradient_accumulation_steps or take 1f1b, zb_h1 or zb_v"
        )
    rounds = _rounds(num_stages, num_micro_batches)
    forwards = [(i, chunk) for batch in rounds for chunk in range(num_chunks) for i in batch]
    backwards = [(i, chunk) for batch in rounds for chunk in reversed(range(num_chunks)) for i in batch]
    actions, peak_live = [], []
    for stage in range(num_stages):
        ahead = min(len(forwards), 2 * (num_stages - 1 - stage) + (num_chunks - 1) * len(rounds[0]))
        actions.append(_stage(stage, ahead, forwards, backwards))
        peak_live.append(min(len(forwards), ahead + 1))
    placement = looped_placement(num_stages, num_chunks)
    return Schedule(
        "interleaved", num_stages, num_micro_batches, num_chunks, placement, tuple(actions), tuple(peak_live)
    )


def _rounds(num_stages: int, num_micro_batches: int) -> list[range]:
    """Micro-batches in rounds of at least `num_stages`, as even as possible, the larger ones first."""
    count = num_micro_batches // num_stages
    size, larger = divmod(num_micro_batches, count)
    rounds, start = [], 0
    for index in range(count):
        stop = start + size + (index < larger)
        rounds.append(range(start, stop))
        start = stop
    return rounds


def _stage(
    stage: int, ahead: int, forwards: list[tuple[int, int]], backwards: list[tuple[int, int]]
) -> tuple[Action, ...]:
    actions = [Action("F", stage, i, chunk) for i, chunk in forwards[:ahead]]
    for at, (i, chunk) in enumerate(backwards):
        if ahead + at < len(forwards):
            actions.append(Action("F", stage, *forwards[ahead + at]))
        actions.append(Action("B", stage, i, chunk))
    return tuple(actions)
