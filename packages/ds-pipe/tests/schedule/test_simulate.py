"""The simulator against a slow, obvious one; measured runs; choosing."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pipe import Action, Costs, Measured, Schedule, ScheduleError, build, choose, simulate

cost = st.integers(0, 9)


def _slow(schedule: Schedule, costs: Costs) -> dict[Action, tuple[float, float]]:
    """Longest paths by relaxation: start = max over needs, repeated until nothing moves."""
    starts = {action: 0.0 for row in schedule.actions for action in row}
    length = {"F": costs.forward, "B": costs.backward, "I": costs.input_gradient, "W": costs.weight_gradient}

    def at(virtual: int, kind: str, i: int) -> Action:
        stage = schedule.placement[virtual]
        return Action(kind, stage, i, schedule.chunks[stage].index(virtual))  # type: ignore[arg-type]

    def end(action: Action) -> float:
        return starts[action] + length[action.kind][schedule.chunks[action.stage][action.chunk]]

    backward = "I" if schedule.splits_backward else "B"
    moved = True
    while moved:
        moved = False
        for row in schedule.actions:
            for before, action in zip((None, *row), row, strict=False):
                virtual = schedule.chunks[action.stage][action.chunk]
                times = [end(before)] if before else [0.0]
                other = virtual - 1 if action.kind == "F" else virtual + 1
                if action.kind != "W" and 0 <= other < schedule.num_virtual_stages:
                    need = at(other, "F" if action.kind == "F" else backward, action.micro_batch)
                    times.append(end(need) + (costs.latency if need.stage != action.stage else 0))
                if max(times) > starts[action]:
                    starts[action], moved = max(times), True
    return {action: (start, end(action)) for action, start in starts.items()}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_v", "interleaved", "inference"])
@settings(max_examples=20, deadline=None)
@given(
    p=st.integers(1, 4),
    m=st.integers(1, 6),
    rows=st.lists(st.tuples(cost, cost, cost), min_size=8, max_size=8),
    latency=st.integers(0, 4),
)
def test_times_are_the_longest_paths(name: str, p: int, m: int, rows: list[tuple[int, int, int]], latency: int) -> None:
    schedule = build(name, p, max(p, m))
    forward, i, w = zip(*rows[: schedule.num_virtual_stages], strict=True)
    costs = Costs(forward, i, w, latency=latency)
    found = {span.action: (span.start, span.end) for row in simulate(schedule, costs).spans for span in row}
    assert found == _slow(schedule, costs)


def test_numbers_of_an_uneven_pipeline() -> None:
    """Two stages, F = 1 and 3, B = 2 and 6, latency 1: 0F0 0..1, 1F0 2..5, 1B0 5..11, 0B0 12..14."""
    costs = Costs((1, 3), (1, 3), (1, 3), activation=(10, 20), latency=1)
    done = simulate(build("1f1b", 2, 1), costs)
    assert [(str(a), s, e) for row in done.spans for a, s, e in row] == [
        ("0F0", 0, 1),
        ("0B0", 12, 14),
        ("1F0", 2, 5),
        ("1B0", 5, 11),
    ]
    assert (done.makespan, done.period, done.busy) == (14, 14, (3, 9))
    assert done.idle_fraction == 1 - Fraction(12, 28)
    assert done.peak_activation == (10, 20)


def test_costs_are_checked() -> None:
    with pytest.raises(ScheduleError, match=r"Costs.weight_gradient has 1 entries; expected 2"):
        Costs((1, 1), (1, 1), (1,))
    with pytest.raises(ScheduleError, match=r"Costs.forward is .*no negative"):
        Costs((-1,), (1,), (1,))
    with pytest.raises(ScheduleError, match=r"latency is nan"):
        Costs((1,), (1,), (1,), latency=float("nan"))
    with pytest.raises(ScheduleError, match=r"2 virtual stages, the costs are for 3"):
        simulate(build("1f1b", 2, 2), Costs.uniform(3))


def test_merging_adds_up() -> None:
    costs = Costs((1, 2, 3), (4, 5, 6), (7, 8, 9), activation=(1, 1, 2), latency=5).merge((0, 2, 3))
    assert costs == Costs((3, 3), (9, 6), (15, 9), (24, 15), (2, 2), 5)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_a_measured_run_gives_its_costs_back(name: str) -> None:
    schedule = build(name, 2, 4)
    num = schedule.num_virtual_stages
    costs = Costs(tuple(range(1, num + 1)), (2.0,) * num, (2.0,) * num)
    plan = simulate(schedule, costs)
    measured = Measured.of("run", [[(a, s + 100, e + 100) for a, s, e in row] for row in plan.spans])
    assert (measured.makespan, measured.bubble_fraction) == (plan.makespan, pytest.approx(float(plan.bubble_fraction)))
    assert Costs.from_measured(measured, schedule) == costs
    with pytest.raises(ScheduleError, match="without a single action"):
        Measured("empty", ((), ())).makespan


def test_choice_takes_the_fastest_that_fits() -> None:
    costs = Costs.uniform(16)
    free = choose(costs, 4, 8)
    assert free.schedule.name == "zb_v"
    assert len(free.verdicts) == 7 and str(free.verdicts[0]).startswith("zb_v x2: the fastest that fits")
    times = [v.simulation.makespan for v in free.verdicts if v.simulation]
    assert times == sorted(times)
    # 16 pieces on 4 stages: 4 units of activation per stage and micro-batch.
    assert max(free.simulation.peak_activation) == 16
    assert any("gpipe: " in str(v) and "slower than zb_v" in str(v) for v in free.verdicts)
    with pytest.raises(ScheduleError, match=r"(?s)no schedule of 4 stages.*memory_cap=15.*1f1b: needs 16 of act"):
        choose(costs, 4, 8, memory_cap=15)


def test_choice_heeds_the_cap() -> None:
    """Costly W and much memory for the early layers: the cap rules out what holds activations longer."""
    costs = Costs((1,) * 4, (1,) * 4, (1,) * 4, activation=(1, 1, 1, 4))
    assert choose(costs, 4, 8).schedule.name == "zb_h1"
    capped = choose(costs, 4, 8, memory_cap=4)
    assert capped.schedule.name == "1f1b"
    reasons = {verdict.name: verdict.reason for verdict in capped.verdicts}
    assert reasons["zb_h1"].startswith("needs 16 of activations, the cap is 4")
    assert reasons["zb_v"] == "needs 8 pieces of the model, the costs have 4"


def test_choice_with_few_micro_batches_says_what_could_not_be_built() -> None:
    verdicts = choose(Costs.uniform(32), 4, 2).verdicts
    assert any("2 micro-batches for 4 stages" in str(verdict) for verdict in verdicts)
