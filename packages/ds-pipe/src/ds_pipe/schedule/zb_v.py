"""ZB-V: two chunks per stage in a V, no bubble with 1F1B's memory (arXiv:2401.10241, section 6; arXiv:2405.15362).

Chunk 0 of stage s is virtual stage s, chunk 1 is virtual stage 2p - 1 - s: the loss is on the first stage, and the last
stage hands its chunk 0's output to its own chunk 1. Backward is split into I and W. With F = I = W = 1 a stage works
6m and idles, between its first and its last action, max(0, 2p - 1 - m, 4p - 1 - 4m): bubble fraction 0 from
m = 2p - 1 micro-batches on. A single step takes p - 1 more, the ramp to the last stage (`Simulation.idle_fraction`).
Peak memory is 2p chunk activations, half the size of a stage's: p, as with 1F1B's first stage.

The order of F and I on stage s (0 and 1 are chunks), for M = max(m, 2p - 1) micro-batches, those from m on left out:

    2(p - s) - 1 times  F0          just enough until micro-batch 0 is back from below
    s times             F1 F0
    p - s times         F1 I1
    M - 2p + 1 + s      F0 I0 F1 I1     the steady state
    p - 1 - s times     I0 F1 I1
    s times             I0 I1
    p - s times         I0

W takes no part in the order: played in unit time over all stages, a stage does a W (chunk 1 first) whenever its next F
or I is not ready or a forward would exceed the memory. That play is deterministic, its outcome is the schedule.
"""

from __future__ import annotations

from collections import deque

from ds_pipe.schedule.action import Action, Kind, Schedule, check_sizes

__all__ = ["zb_v"]

_Step = tuple[Kind, int]  # kind and chunk
_F0: _Step = ("F", 0)
_F1: _Step = ("F", 1)
_I0: _Step = ("I", 0)
_I1: _Step = ("I", 1)


def zb_v(num_stages: int, num_micro_batches: int) -> Schedule:
    """The ZB-V schedule; peak live chunk activations are 2 min(num_micro_batches, num_stages) on every stage."""
    check_sizes("zb_v", num_stages, num_micro_batches)
    ends: dict[tuple[str, int], list[int]] = {(kind, virtual): [] for kind in "FI" for virtual in range(2 * num_stages)}
    stages = [_Stage(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    todo = stages
    now = 0
    while todo:
        # All stages choose before any moves: what ends at this tick counts only from the next one on.
        chosen = [(stage, stage.choose(ends, now)) for stage in todo]
        now += 1
        for stage, action in chosen:
            if action is not None:
                stage.do(action, ends, now)
        todo = [stage for stage in todo if stage.order or stage.owed[0] or stage.owed[1]]
    placement = (*range(num_stages), *reversed(range(num_stages)))
    actions = tuple(tuple(stage.done) for stage in stages)
    peak_live = (2 * min(num_micro_batches, num_stages),) * num_stages
    return Schedule("zb_v", num_stages, num_micro_batches, 2, placement, actions, peak_live)


class _Stage:
    """One stage while the schedule is played: the F and I to come, the W owed per chunk, what is done."""

    def __init__(self, stage: int, num_stages: int, num_micro_batches: int) -> None:
        self.virtual = (stage, 2 * num_stages - 1 - stage)
        self.last = 2 * num_stages - 1
        self.order = deque(_order(stage, num_stages, num_micro_batches))
        self.owed: tuple[deque[Action], deque[Action]] = (deque(), deque())
        self.done: list[Action] = []
        self.room = 2 * num_stages

    def choose(self, ends: dict[tuple[str, int], list[int]], now: int) -> Action | None:
        """The next F or I if it can start at `now`, else a W, else None: wait."""
        if self.order and self._ready(self.order[0], ends, now):
            return self.order[0]
        owed = self.owed[1] or self.owed[0]
        return owed[0] if owed else None

    def _ready(self, action: Action, ends: dict[tuple[str, int], list[int]], now: int) -> bool:
        kind, _, i, chunk = action
        virtual = self.virtual[chunk]
        if kind == "F":
            if not self.room:
                return False
            virtual -= 1
        else:
            if len(ends["F", virtual]) <= i:
                return False
            virtual += 1
        if not 0 <= virtual <= self.last:
            return True
        arrived = ends[kind, virtual]
        return i < len(arrived) and arrived[i] <= now

    def do(self, action: Action, ends: dict[tuple[str, int], list[int]], end: int) -> None:
        kind, stage, i, chunk = action
        self.done.append(action)
        if kind == "W":
            self.owed[chunk].popleft()
            self.room += 1
            return
        self.order.popleft()
        ends[kind, self.virtual[chunk]].append(end)
        if kind == "F":
            self.room -= 1
        else:
            self.owed[chunk].append(Action("W", stage, i, chunk))


def _order(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The F and I of `stage`; see the module's table."""
    above, steady = num_stages - stage, max(num_micro_batches, 2 * num_stages - 1) - 2 * num_stages + 1 + stage
    steps = [
        *[_F0] * (2 * above - 1),
        *[_F1, _F0] * stage,
        *[_F1, _I1] * above,
        *[_F0, _I0, _F1, _I1] * steady,
        *[_I0, _F1, _I1] * (above - 1),
        *[_I0, _I1] * stage,
        *[_I0] * above,
    ]
    counts = dict.fromkeys(steps, 0)
    actions = []
    for step in steps:
        i = counts[step]
        counts[step] += 1
        if i < num_micro_batches:
            actions.append(Action(step[0], stage, i, step[1]))
    return actions
