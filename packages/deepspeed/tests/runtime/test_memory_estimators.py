"""The estimates: of numbers they are the memory law, of a model what a run on as many ranks really holds."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import WIDTH, Net, make_config, make_engine, micro_batch

import deepspeed
from deepspeed.runtime.zero import memory_estimators, stage3, stage_1_and_2
from ds_comm.testing import run_ranks

P, LAYER = 1000, 100


def test_cold_estimates_are_the_memory_law() -> None:
    assert stage_1_and_2.estimate_zero2_model_states_mem_needs(P, 4, 2, False, 1.0) == (16 * P, 2 * P + 14 * P / 8)
    assert stage_1_and_2.estimate_zero2_model_states_mem_needs(P, 4, 2, True, 1.5)[1] == 2 * P + 2 * P / 8
    estimate = stage3.estimate_zero3_model_states_mem_needs
    assert estimate(P, LAYER, 4, 2, False, False, True, 1.0) == (4 * LAYER * 4, 400 + 16 * P / 8, 400)
    assert estimate(P, 10, 4, 2, True, True, True, 1.0)[:2] == (14 * P / 2, 40 + 2 * P / 8)
    (row,) = stage_1_and_2.estimate_zero0_model_states_mem_needs_all_cold(P, 4, 2)
    assert row["device_bytes"] == 16 * P
    rows = stage_1_and_2.estimate_zero1_model_states_mem_needs_all_cold(P, 4, 2)
    assert [r["device_bytes"] for r in rows] == [2 * P + 2 * P / 8, 2 * P + 14 * P / 8]
    assert rows == stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(P, 4, 2)
    assert len(stage3.estimate_zero3_model_states_mem_needs_all_cold(P, LAYER)) == 6


def test_the_table_has_upstreams_columns(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("DeepSpeed").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="DeepSpeed"):
            stage3.estimate_zero3_model_states_mem_needs_all_cold(2_851_000_000, 32_000_000, 8, 1)
    finally:
        logging.getLogger("DeepSpeed").removeHandler(caplog.handler)
    lines = caplog.text.splitlines()
    assert "HW: Setup with 1 node, 8 GPUs per node." in lines
    assert "SW: Model with 2851M total params, 32M largest layer params." in lines
    assert "  per CPU  |  per GPU |   Options" in lines
    assert "    1.43GB |   5.43GB | offload_param=none, offload_optimizer=none, zero_init=1" in lines
    assert "   47.79GB |   1.45GB | offload_param=none, offload_optimizer=cpu, zero_init=1" in lines


class Tied(Net):
    """A tied and a frozen parameter among small and large ones."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].down.weight.requires_grad_(False)
        self.embed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(x), target)


def held(stage: int) -> tuple[float, float]:
    """Bytes that a rank holds between backward and step, and of masters and moments among them."""
    model = Tied()
    config = make_config(stage, "bf16")
    del config["zero_optimization"]["stage3_param_persistence_threshold"]  # defaults, as the estimate has them
    engine = make_engine(config, model, model_parameters=[p for p in model.parameters() if p.requires_grad])
    for step in range(2):  # the first step makes the moments
        engine.backward(engine(*micro_batch(step, 0, torch.bfloat16)))
        if step == 0:
            engine.step()
    units = engine.sharded.units
    parameters = sum((u.storage.shard if u.sharded else u.storage.full).nbytes for u in units)
    masters = sum(u.master.nbytes for u in units if u.master is not None)
    states = [t for s in engine.basic_optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    gradients = sum(u.grad.nbytes for u in units if u.grad is not None)
    moments = masters + sum(t.nbytes for t in states)
    return float(parameters + moments + gradients), float(moments)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_live_estimates_are_what_two_ranks_hold(stage: int) -> None:
    name = f"estimate_zero{stage}_model_states_mem_needs_all_live"
    rows = getattr(memory_estimators, name)(Tied(), num_gpus_per_node=2)
    states = memory_estimators.ModelStates.of_model(stage, Tied(), 2)
    assert states.total_params == sum(p.numel() for p in Tied().parameters())
    plain = next(row for row in rows if not row["cpu_offload"])
    ranks = run_ranks(held, 2, stage)
    assert ranks[0] == (plain["device_bytes"] - states.in_flight, states.states)
    assert ranks[1] <= ranks[0]  # padding is at the end, and the last rank has no moments for it
    if stage:
        offloaded = next(row for row in rows if row["cpu_offload"] and not row.get("cpu_offload_params"))
        assert offloaded["device_bytes"] == plain["device_bytes"] - states.states


def test_a_model_under_zero_init_is_estimated_as_any_other() -> None:
    with deepspeed.zero.Init(dtype=torch.float32):
        sharded = Tied()
    found = memory_estimators.ModelStates.of_model(3, sharded, 4)
    assert found == memory_estimators.ModelStates.of_model(3, Tied(), 4)
