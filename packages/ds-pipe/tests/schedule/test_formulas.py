"""Times, bubbles and memory of every schedule: the papers' formulas exactly, and the optimum for small sizes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimal import optimum

from ds_pipe import Costs, ScheduleError, build, interleaved, simulate, zb_h1, zb_v

stages = st.integers(1, 9)
micro_batches = st.integers(1, 30)
unit_costs = st.fractions(min_value=0, max_value=5, max_denominator=7)
some_cost = st.fractions(min_value=Fraction(1, 7), max_value=5, max_denominator=7)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@settings(max_examples=60, deadline=None)
@given(p=stages, m=micro_batches, forward=some_cost, i=unit_costs, w=unit_costs)
def test_whole_backwards_lose_p_minus_1_over_m_plus_p_minus_1(
    name: str, p: int, m: int, forward: Fraction, i: Fraction, w: Fraction
) -> None:
    done = simulate(build(name, p, m), Costs.uniform(p, forward, i, w))
    assert done.bubble_fraction == done.idle_fraction == Fraction(p - 1, m + p - 1)
    assert done.makespan == (m + p - 1) * (forward + i + w)
    assert done.peak_live == tuple(m if name == "gpipe" else min(m, p - s) for s in range(p))


@settings(max_examples=60, deadline=None)
@given(p=stages, m=micro_batches, v=st.integers(2, 4), forward=some_cost, i=unit_costs, w=unit_costs)
def test_interleaved_divides_the_bubble_by_the_chunks(
    p: int, m: int, v: int, forward: Fraction, i: Fraction, w: Fraction
) -> None:
    """For any m >= p, also where p does not divide m."""
    m = max(m, p)
    done = simulate(interleaved(p, m, v), Costs.uniform(p * v, forward, i, w))
    assert done.bubble_fraction == done.idle_fraction == Fraction(p - 1, v * m + p - 1)
    round_size = -(-m // (m // p))
    assert done.peak_live == tuple(min(v * m, 2 * (p - 1 - s) + (v - 1) * round_size + 1) for s in range(p))


@settings(max_examples=60, deadline=None)
@given(p=stages, m=micro_batches)
def test_zb_h1_has_a_third_of_the_bubble(p: int, m: int) -> None:
    done = simulate(zb_h1(p, m))
    assert done.makespan == done.period == max(3 * m + p - 1, 2 * m + 2 * p - 1)
    if m >= p:
        assert done.bubble_fraction == done.idle_fraction == Fraction(p - 1, 3 * m + p - 1)
    assert done.peak_live == (min(m, p),) * p


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 14), m=micro_batches)
def test_zb_v_has_no_bubble_from_2p_minus_1_micro_batches_on(p: int, m: int) -> None:
    done = simulate(zb_v(p, m))
    assert done.period == 6 * m + max(0, 2 * p - 1 - m, 4 * p - 1 - 4 * m)
    if m >= 2 * p - 1:
        assert done.bubble_fraction == 0
        assert done.idle_fraction == Fraction(p - 1, 6 * m + p - 1)
    assert done.peak_live == (2 * min(m, p),) * p


@settings(max_examples=30, deadline=None)
@given(p=stages, m=micro_batches)
def test_forward_only_takes_m_plus_p_minus_1(p: int, m: int) -> None:
    done = simulate(build("inference", p, m))
    assert done.makespan == m + p - 1
    assert done.peak_live == (1,) * p


@pytest.mark.parametrize(
    ("name", "p", "m"),
    [
        *(("gpipe", p, m) for p, m in ((2, 1), (2, 3), (2, 5), (3, 2), (3, 3))),
        *(("1f1b", p, m) for p, m in ((2, 1), (2, 3), (2, 6), (3, 2), (3, 4), (4, 2), (4, 3))),
        *(("interleaved", p, m) for p, m in ((2, 2), (2, 3), (2, 4), (3, 3))),
        *(("zb_h1", p, m) for p, m in ((2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (3, 5), (4, 3))),
        *(("zb_v", p, m) for p, m in ((2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2))),
    ],
)
def test_no_schedule_of_the_same_memory_is_faster(name: str, p: int, m: int) -> None:
    """Exhaustive search over all schedules with the same placement and at most the same live activations per stage."""
    schedule = build(name, p, m)
    least = optimum(schedule.placement, m, schedule.peak_live, split=schedule.splits_backward)
    assert simulate(schedule).makespan == least


def test_the_search_finds_more_and_less() -> None:
    """With less memory than 1F1B's a step takes longer; with backwards split it takes less."""
    whole = simulate(build("1f1b", 2, 4)).makespan
    assert optimum((0, 1), 4, (1, 1), split=False) > whole == optimum((0, 1), 4, (2, 1), split=False)
    assert optimum((0, 1), 4, (2, 2), split=True) < whole


@pytest.mark.parametrize(
    ("name", "p", "m", "chunks", "text"),
    [
        ("1f1b", 0, 4, None, "num_stages is 0"),
        ("zb_v", 2, 0, None, "num_micro_batches is 0"),
        ("interleaved", 4, 3, 2, "3 micro-batches for 4 stages"),
        ("interleaved", 4, 4, 1, "num_chunks is 1"),
        ("zb_v", 2, 4, 3, r"zb_v has 2 chunk\(s\)"),
        ("1f2b", 2, 4, None, "unknown; expected one of 1f1b"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, p: int, m: int, chunks: int | None, text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        build(name, p, m, chunks)
