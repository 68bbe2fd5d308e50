"""A trace of steps: every unit's compute and every collective of all ranks, and nothing is changed by looking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import make_config, make_engine, make_net, train

import ds_comm
from deepspeed.profiling import trace_steps
from ds_comm.testing import run_ranks


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    yield
    if ds_comm.is_initialized():
        ds_comm.destroy_process_group()


def traced(stage: int, path: str | None) -> Any:
    engine = make_engine(make_config(stage, gradient_accumulation_steps=2), make_net())
    ledger = ds_comm.communicator().ledger
    losses = train(engine, range(1))
    ledger.reset()
    if path is None:
        losses += train(engine, range(1, 2))
    else:
        with trace_steps(engine, path):
            losses += train(engine, range(1, 2))
    counts = {f"{op} {label}".strip(): count for (op, label), count in ledger.counts.items()}
    assert ledger.events is None and "forward" not in engine.__dict__
    losses += train(engine, range(2, 3))
    return losses, counts


@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_units_and_collectives_are_there(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.json"
    results = run_ranks(traced, 2, stage, str(path))
    assert [losses for losses, _ in results] == [losses for losses, _ in run_ranks(traced, 2, stage, None)]
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert rows == {"phases": 0, "units": 1, "communication": 2, "calls": 3}
    for rank in range(2):
        own = [event for event in events if event["pid"] == rank and event["ph"] != "M"]
        units = [event["name"] for event in own if event["tid"] == rows["units"]]
        micro = ["forward blocks.0", "forward blocks.1", "forward head"]
        micro += ["backward head", "backward blocks.1", "backward blocks.0"]
        assert units == micro * 2
        phases = [event for event in own if event["tid"] == rows["phases"]]
        assert [event["name"] for event in phases] == ["forward", "backward", "step"] * 2
        calls = [event["name"] for event in own if event["tid"] == rows["calls"]]
        counts = results[rank][1]
        wanted = [name for name in counts if name.startswith(("reduce_scatter", "all_gather "))]
        assert {name: calls.count(name) for name in wanted} == {name: counts[name] for name in wanted}
        spans = [event for event in own if event["tid"] == rows["communication"]]
        assert any(event["name"] == "reduce_scatter blocks.0" and event["dur"] > 0 for event in spans)
        assert all(event["ts"] >= 0 for event in own)
        first, last = phases[0], phases[-1]
        inside = [event for event in own if event["tid"] == rows["units"]]
        assert first["ts"] <= min(e["ts"] for e in inside)
        assert max(e["ts"] + e["dur"] for e in inside) <= last["ts"] + last["dur"]


def test_a_failure_inside_takes_everything_away(tmp_path: Path) -> None:
    engine = make_engine(make_config(0), make_net())
    with pytest.raises(KeyError), trace_steps(engine, tmp_path / "trace.json"):
        raise KeyError("x")
    assert not (tmp_path / "trace.json").exists()
    assert ds_comm.communicator().ledger.events is None and "step" not in engine.__dict__
    assert not engine.module.blocks[0]._forward_hooks
