"""From a schedule to a program: the explicit sends and receives of every stage, in an order that cannot deadlock.

A *transfer* carries the activation of virtual stage k to k + 1, or the gradient from k + 1 back to k, when those live
on different stages. A *program* is, per stage, its actions with `Send` and `Recv` between them.

Why no deadlock, even when every send blocks until its receive is there (rendezvous) and each stage does one thing at a
time: the actions, played with positive costs, and the transfers are put into one total order of all events, an action
at its start and a transfer at the end of what made it. A result is made before it is transferred, and transferred
before it is used, so the order respects every need; and each stage's program is that order restricted to the events
the stage takes part in. In any state the earliest event not yet done is at the head of everyone it involves, so it can
happen. An executor whose sends do not block only gains freedom. `check_program` does not rely on this argument: it
plays the program with rendezvous.

A send follows its action at once; a receive stands before the first action that starts, in the plan, after the
result was made. An executor may post the receive there and wait for it only before the action that needs it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule._engine import Time
from ds_pipe.schedule.action import Action, Schedule
from ds_pipe.schedule.simulate import Costs, play

__all__ = ["Op", "Program", "Recv", "Send", "Transfer", "check_program", "lower"]


class Transfer(NamedTuple):
    """One message: the activation (or gradient) of `micro_batch`, made by virtual stage `source` for `target`."""

    payload: Literal["activation", "gradient"]
    micro_batch: int
    source: int
    target: int


class Send(NamedTuple):
    """Send `transfer` to stage `peer`."""

    transfer: Transfer
    peer: int


class Recv(NamedTuple):
    """Receive `transfer` from stage `peer`."""

    transfer: Transfer
    peer: int


Op = Action | Send | Recv
Program = tuple[tuple[Op, ...], ...]


def lower(schedule: Schedule, costs: Costs | None = None) -> Program:
    """The program of `schedule`, ordered by its simulation with `costs` (default: every kind takes 1).

    ScheduleError if an action of the schedule costs nothing: then start and end are no order of events.
    """
    costs = costs or Costs.uniform(schedule.num_virtual_stages)
    starts, ends = play(schedule, costs)
    placement, last = schedule.placement, schedule.num_virtual_stages - 1
    sends: list[list[Send | None]] = []
    receives: list[list[tuple[Time, int, int, Recv]]] = [[] for _ in schedule.actions]
    for stage, actions in enumerate(schedule.actions):
        mine: list[Send | None] = []
        chunks = schedule.chunks[stage]
        for action, start, end in zip(actions, starts[stage], ends[stage], strict=True):
            if not end > start:
                raise ScheduleError(f"{action} costs {end - start}; lowering needs costs above zero for what is done")
            kind, _, i, chunk = action
            source = chunks[chunk]
            target = source + 1 if kind == "F" else source - 1
            if kind == "W" or not 0 <= target <= last or placement[target] == stage:
                mine.append(None)
                continue
            transfer = Transfer("activation" if kind == "F" else "gradient", i, source, target)
            peer = placement[target]
            mine.append(Send(transfer, peer))
            receives[peer].append((end, source, target, Recv(transfer, stage)))
        sends.append(mine)
    return tuple(
        _merge(actions, starts[stage], ends[stage], sends[stage], receives[stage])
        for stage, actions in enumerate(schedule.actions)
    )


def _merge(
    actions: tuple[Action, ...],
    starts: list[Time],
    ends: list[Time],
    sends: list[Send | None],
    receives: list[tuple[Time, int, int, Recv]],
) -> tuple[Op, ...]:
    """One stage's events in the total order: by time; at one moment transfers, by source and target, before actions."""
    receives.sort()  # time, source and target differ between any two: a virtual stage ends one thing at a time
    ops: list[Op] = []
    num_receives, at = len(receives), 0
    for action, start, end, send in zip(actions, starts, ends, sends, strict=True):
        while at < num_receives and receives[at][0] <= start:
            ops.append(receives[at][3])
            at += 1
        ops.append(action)
        if send is not None:
            mine = (end, send.transfer.source, send.transfer.target)
            while at < num_receives and receives[at][:3] < mine:
                ops.append(receives[at][3])
                at += 1
            ops.append(send)
    return tuple(ops)


def check_program(program: Program) -> None:
    """Play `program` with rendezvous: a send and its receive happen together, when both are at the head.

    ScheduleError when nothing can go on before all is done: the text shows what each stage stands before. O(ops).
    """
    heads = [0] * len(program)
    todo = list(range(len(program)))
    while todo:
        stage = todo.pop()
        ops = program[stage]
        at, stop = heads[stage], len(ops)
        while at < stop:
            op = ops[at]
            if not isinstance(op, Action):
                peer = op.peer
                theirs = program[peer][heads[peer]] if heads[peer] < len(program[peer]) else op
                if isinstance(theirs, Action) or type(theirs) is type(op):
                    break
                if peer == stage or theirs.peer != stage or theirs.transfer != op.transfer:
                    break
                heads[peer] += 1
                todo.append(peer)
            at += 1
        heads[stage] = at
    if any(at < len(ops) for at, ops in zip(heads, program, strict=True)):
        lines = [
            f"  stage {stage}: {_text(ops[at]) if at < len(ops) else 'done'}"
            for stage, (at, ops) in enumerate(zip(heads, program, strict=True))
        ]
        raise ScheduleError("\n".join(["deadlock under blocking sends; each stage stands before:", *lines]))


def _text(op: Op) -> str:
    if isinstance(op, Action):
        return str(op)
    verb = "send to" if isinstance(op, Send) else "receive from"
    payload, i, source, target = op.transfer
    return f"{verb} stage {op.peer}: {payload} of micro-batch {i}, virtual stage {source} -> {target}"
