"""Pictures hold every action at its time, for the plan, the run, and both."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from ds_pipe import Measured, ScheduleError, build, simulate, to_svg, to_text, to_trace, zb_v

PLAN = simulate(build("1f1b", 2, 2))
RUN = Measured.of("run", [[(a, 7 + s * 0.5, 7 + e * 0.5) for a, s, e in row] for row in PLAN.spans])


def test_text_has_a_column_per_unit() -> None:
    assert to_text(PLAN).splitlines() == [
        "plan 1f1b: time 9, bubble 33.3%",
        "plan   0 |FF..B0.B1|",
        "plan   1 |.FB0FB1..|",
    ]


def test_text_marks_chunks_and_waiting() -> None:
    lines = to_text(simulate(zb_v(2, 3))).splitlines()
    assert [len(line) for line in lines[1:]] == [len("plan   0 ||") + 19] * 2
    assert lines[1].startswith("plan   0 |FFFf") and lines[2].startswith("plan   1 |.F")
    assert lines[1].count("F") == lines[1].count("f") == lines[1].count("i") == lines[1].count("W") == 3


def test_text_of_plan_and_run_have_the_same_scale() -> None:
    lines = to_text(PLAN, RUN, width=90).splitlines()
    assert [line[:8].split() for line in lines[1:]] == [["plan", "0"], ["run", "0"], ["plan", "1"], ["run", "1"]]
    assert lines[1].partition("|")[2] == lines[2].partition("|")[2]
    assert "\x1b[30;44m" in to_text(PLAN, color=True)


def test_svg_is_well_formed_and_whole() -> None:
    root = ElementTree.fromstring(to_svg(PLAN, RUN))
    titles = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * PLAN.schedule.num_actions
    assert titles[0] == "0F0: 0 to 0.5" and "1B1: 2.5 to 3.5" in titles


def test_trace_has_each_action_once_per_run() -> None:
    events = json.loads(to_trace(PLAN, RUN, microseconds_per_unit=1000))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * PLAN.schedule.num_actions
    first = {(event["pid"], event["name"]): event for event in spans}[1, "1F0"]
    assert (first["tid"], first["ts"], first["dur"], first["cat"]) == (1, 500, 500, "F")
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {"stage 0", "stage 1"}


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="nothing to draw"):
        to_svg()
    with pytest.raises(ScheduleError, match="2 stages, the measured run 1"):
        to_text(PLAN, Measured("run", RUN.spans[:1]))
