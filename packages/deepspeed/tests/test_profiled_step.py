"""Config section `flops_profiler`: one step of an engine is profiled on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import make_config, make_engine, make_net, micro_batch, train

import ds_comm
from deepspeed.profiling import FlopsProfiler
from deepspeed.profiling.report import params_to_string
from ds_comm.testing import run_ranks


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    yield
    if ds_comm.is_initialized():
        ds_comm.destroy_process_group()


def profiled_engine(stage: int, folder: str) -> Any:
    profile = {"enabled": True, "profile_step": 1, "output_file": f"{folder}/profile.txt"}
    engine = make_engine(make_config(stage, flops_profiler=profile), make_net())
    losses = train(engine, range(3))
    return losses, [type(c).__name__ for c in engine.callbacks]


def test_one_step_of_a_sharded_run_is_profiled_on_rank_0(tmp_path: Path) -> None:
    results = run_ranks(profiled_engine, 2, 3, str(tmp_path))
    text = (tmp_path / "profile.txt").read_text()
    params = sum(p.numel() for p in make_net().parameters())
    assert f"{params_to_string(params)}\n" in text and "of DeepSpeedEngine at step 1" in text
    x, target = micro_batch(0, 0)
    profiler = FlopsProfiler(model := make_net())
    profiler.start_profile()
    model(x, target).backward()
    profiler.stop_profile()
    for total in (profiler.get_total_flops(), profiler.flops_of("backward")):
        assert f" {total / 1e3:g} KFLOPS" in text  # of one micro-batch of one rank
    assert "ProfiledStep" in results[0][1] and "ProfiledStep" not in results[1][1]
    plain = train(make_engine(make_config(0), make_net()), range(3), num_micro_batches=2)
    assert results[0][0][0] == plain[0]  # watched, not changed
