"""Every schedule is proven; every kind of damage is found; lowered programs match and do not deadlock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pipe import Action, Costs, Recv, Schedule, ScheduleError, Send, build, check_program, lower, simulate, validate

SHAPES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("zb_h1", 1),
    ("zb_v", 2),
    ("interleaved", 2),
    ("interleaved", 3),
    ("inference", 1),
]


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 7), m=st.integers(1, 20))
def test_every_schedule_is_valid(name: str, chunks: int, p: int, m: int) -> None:
    validate(build(name, p, max(m, p) if name == "interleaved" else m, chunks))


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
@settings(max_examples=15, deadline=None)
@given(
    p=st.integers(1, 5),
    m=st.integers(1, 9),
    costs=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=15, max_size=15),
    latency=st.integers(0, 5),
)
def test_programs_run_with_blocking_sends_whatever_the_costs(
    name: str, chunks: int, p: int, m: int, costs: list[tuple[int, int, int]], latency: int
) -> None:
    schedule = build(name, p, max(m, p) if name == "interleaved" else m, chunks)
    columns = zip(*costs[: schedule.num_virtual_stages], strict=True)
    program = lower(schedule, Costs(*map(tuple, columns), latency=latency))  # type: ignore[arg-type]
    check_program(program)
    sent = Counter((op.transfer, stage, op.peer) for stage, ops in enumerate(program) for op in ops if type(op) is Send)
    got = Counter((op.transfer, op.peer, stage) for stage, ops in enumerate(program) for op in ops if type(op) is Recv)
    assert sent == got
    hops = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    assert sum(sent.values()) == hops * schedule.num_micro_batches * (1 if schedule.forward_only else 2)
    for stage, ops in enumerate(program):
        assert tuple(op for op in ops if type(op) is Action) == schedule.actions[stage]
        _check_in_time(schedule, stage, ops)


def _check_in_time(schedule: Schedule, stage: int, ops: tuple[object, ...]) -> None:
    """What arrives is received before it is used, what is sent has been made."""
    arrived, made = set(), set()
    for op in ops:
        if isinstance(op, Recv):
            arrived.add((op.transfer.payload, op.transfer.micro_batch, op.transfer.target))
        elif isinstance(op, Send):
            assert (op.transfer.payload, op.transfer.micro_batch, op.transfer.source) in made
        elif isinstance(op, Action) and op.kind != "W":
            virtual = schedule.chunks[stage][op.chunk]
            payload = "activation" if op.kind == "F" else "gradient"
            other = virtual + (-1 if op.kind == "F" else 1)
            if 0 <= other < schedule.num_virtual_stages and schedule.placement[other] != stage:
                assert (payload, op.micro_batch, virtual) in arrived
            made.add((payload, op.micro_batch, virtual))


def _with(schedule: Schedule, stage: int, *codes: str) -> Schedule:
    rows = list(schedule.actions)
    rows[stage] = tuple(map(Action.parse, codes))
    return replace(schedule, actions=tuple(rows))


GOOD = build("1f1b", 2, 2)  # 0F0 0F1 0B0 0B1 | 1F0 1B0 1F1 1B1


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (_with(GOOD, 0, "0F0", "0F1", "0B0"), "stage 0 never does B of micro-batch 1"),
        (_with(GOOD, 0, "0F0", "0F1", "0B0", "0B0", "0B1"), "0B0 comes twice"),
        (_with(GOOD, 0, "0F0", "0B0", "0B1", "0F1"), "0B1 comes before the F"),
        (_with(GOOD, 0, "0F0", "0F1", "0B1", "0B0"), "accumulates micro-batch 1 where 0 is next"),
        (_with(GOOD, 0, "0F0", "0F1", "0B0", "1B1"), "1B1 on stage 0"),
        (_with(GOOD, 0, "0F0", "0F1", "0B0", "0B2"), "0B2 on stage 0"),
        (_with(GOOD, 0, "0F0", "0F1", "0B0", "0W1"), "0W1 on stage 0"),
        (_with(GOOD, 0, "0F0", "0F1", "0B0", "0B1/1"), "0B1/1 on stage 0"),
        (_with(GOOD, 1, "1F0", "1F1", "1B0", "1B1"), "stage 1 holds up to 2 activations; it claims 1"),
        (replace(GOOD, peak_live=(2, 2)), "stage 1 holds up to 1 activations; it claims 2"),
        (replace(GOOD, placement=(0, 0)), r"placement is \(0, 0\)"),
        (replace(GOOD, actions=GOOD.actions[:1]), "actions are given for 1 stages; expected 2"),
        (_with(build("zb_h1", 1, 1), 0, "0F0", "0W0", "0I0"), "0W0 comes before the I"),
    ],
)
def test_damage_is_named(broken: Schedule, text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        validate(broken)


def test_contradicting_orders_show_where_everybody_stands() -> None:
    """Stage 0 wants 0's gradient before it forwards 1; stage 1 wants 1's activation before it gives 0's gradient."""
    broken = _with(_with(GOOD, 0, "0F0", "0B0", "0F1", "0B1"), 1, "1F0", "1F1", "1B0", "1B1")
    with pytest.raises(ScheduleError, match=r"(?s)contradict.*stage 0: 0F0 >>0B0<< 0F1.*stage 1: 1F0 >>1F1<< 1B0"):
        simulate(broken)


def test_a_deadlock_under_blocking_sends_is_found() -> None:
    """Both stages send before they receive: buffered sends would hide it."""
    program = lower(build("1f1b", 2, 3))
    swapped = []
    for ops in program:
        sends_first = list(ops)
        for at in range(len(ops) - 1):
            if isinstance(sends_first[at], Recv) and isinstance(sends_first[at + 1], Send):
                sends_first[at : at + 2] = sends_first[at + 1], sends_first[at]
        swapped.append(tuple(sends_first))
    check_program(program)
    with pytest.raises(ScheduleError, match=r"(?s)deadlock under blocking sends.*stage 0: send to stage 1"):
        check_program(tuple(swapped))


def test_an_unmatched_message_is_found() -> None:
    first, second = lower(build("1f1b", 2, 1))
    with pytest.raises(ScheduleError, match=r"(?s)stage 0: receive from stage 1: gradient of micro-batch 0.*1: done"):
        check_program((first, tuple(op for op in second if not isinstance(op, Send))))


def test_lowering_needs_costs_above_zero() -> None:
    with pytest.raises(ScheduleError, match="0F0 costs 0"):
        lower(GOOD, Costs.uniform(2, forward=0))


def test_codes_round_trip() -> None:
    for action in (Action("F", 2, 0), Action("W", 10, 31, 1)):
        assert Action.parse(str(action)) == action
    assert (str(Action("F", 2, 0)), str(Action("I", 3, 7, 1))) == ("2F0", "3I7/1")
    with pytest.raises(ScheduleError, match="'2X0' is no action"):
        Action.parse("2X0")
    assert str(GOOD).splitlines() == ["1f1b: 2 stages, 2 micro-batches", "0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zb_v", "interleaved"])
def test_a_thousand_stages_or_micro_batches(name: str) -> None:
    """Large plans are ordinary: proven here, timed in no test."""
    validate(build(name, 8, 1000))
    if name != "interleaved":
        validate(build(name, 500, 2))
