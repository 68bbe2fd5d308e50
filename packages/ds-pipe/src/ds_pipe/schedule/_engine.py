"""The one event loop under `simulate`, `lower` and `validate`: when each action starts and ends.

Each stage runs its list in order, one action at a time; an action waits for what it needs:

    F of virtual stage k needs F of k - 1;   B or I of k needs F of k and B or I of k + 1;   W of k needs its own I.

A result reaches another stage `latency` after its end and never holds up its sender. The loop runs a stage as far as it
goes, parks it under the result it waits for, and wakes it when that result is there: O(actions). A stage that is never
woken means that the orders contradict each other, which is an error that shows where every stage stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.action import Schedule

__all__ = ["Time", "Times", "peak_live", "run", "where"]

Time = float  # ints and Fractions stay what they are, so that sums are exact when the costs are
Times = list[list[Time]]


def run(
    schedule: Schedule,
    forward: Sequence[Time],
    backward: Sequence[Time],
    input_gradient: Sequence[Time],
    weight_gradient: Sequence[Time],
    latency: Time = 0,
) -> tuple[Times, Times]:
    """Starts and ends of all actions, as lists that run beside `schedule.actions`; durations per virtual stage.

    ScheduleError when the orders of the stages contradict each other or an action comes before its own forward.
    """
    num_micro, num_virtual, placement = schedule.num_micro_batches, schedule.num_virtual_stages, schedule.placement
    forward_end: list[list[Time | None]] = [[None] * num_micro for _ in range(num_virtual)]
    backward_end: list[list[Time | None]] = [[None] * num_micro for _ in range(num_virtual)]
    durations = {"F": forward, "B": backward, "I": input_gradient, "W": weight_gradient}
    starts: Times = [[] for _ in schedule.actions]
    ends: Times = [[] for _ in schedule.actions]
    parked: dict[tuple[bool, int, int], int] = {}
    todo = list(range(schedule.num_stages))[::-1]
    while todo:
        stage = todo.pop()
        actions, chunks, began, ended = schedule.actions[stage], schedule.chunks[stage], starts[stage], ends[stage]
        now: Time = ended[-1] if ended else 0
        for at in range(len(ended), len(actions)):
            kind, _, i, chunk = actions[at]
            virtual = chunks[chunk]
            is_forward = kind == "F"
            if is_forward:
                done, needed = forward_end, virtual - 1
            elif kind == "W":
                done, needed = backward_end, virtual
            else:
                done, needed = backward_end, virtual + 1 if virtual + 1 < num_virtual else -1
                if forward_end[virtual][i] is None:
                    raise ScheduleError(f"{schedule.name}: {actions[at]} comes before its own forward on stage {stage}")
            if needed >= 0:
                ready = done[needed][i]
                if ready is None:
                    parked[is_forward, needed, i] = stage
                    break
                if placement[needed] != stage:
                    ready += latency
                if ready > now:
                    now = ready
            began.append(now)
            now += durations[kind][virtual]
            ended.append(now)
            if kind != "W":
                (forward_end if is_forward else backward_end)[virtual][i] = now
                woken = parked.pop((is_forward, virtual, i), None)
                if woken is not None:
                    todo.append(woken)
    if any(len(ended) < len(actions) for ended, actions in zip(ends, schedule.actions, strict=True)):
        raise ScheduleError(
            f"{schedule.name}: no stage can go on, their orders contradict each other\n"
            + where(schedule, [len(ended) for ended in ends])
        )
    return starts, ends


def where(schedule: Schedule, heads: Sequence[int], around: int = 4) -> str:
    """A line per stage with the action it stands before marked as >>2F0<<, and a few around it."""
    lines = []
    for stage, (actions, head) in enumerate(zip(schedule.actions, heads, strict=True)):
        codes = [f">>{action}<<" if at == head else str(action) for at, action in enumerate(actions)]
        shown = codes[max(0, head - around) : head + around + 1]
        lines.append(f"  stage {stage}: " + (" ".join(shown) if head < len(actions) else "done"))
    return "\n".join(lines)


def peak_live(schedule: Schedule, stage: int, sizes: Sequence[Time] | None = None) -> Time:
    """The most that stage `stage` holds at once; `sizes` is per virtual stage, one activation each by default.

    A stage does one thing at a time, so its peak follows from its order alone, whatever the costs are.
    """
    held: Time = 0
    peak: Time = 0
    chunks, keeps = schedule.chunks[stage], not schedule.forward_only
    for kind, _, _, chunk in schedule.actions[stage]:
        size = 1 if sizes is None else sizes[chunks[chunk]]
        if kind == "F":
            held += size
            if held > peak:
                peak = held
            if not keeps:
                held -= size
        elif kind != "I":
            held -= size
    return peak
