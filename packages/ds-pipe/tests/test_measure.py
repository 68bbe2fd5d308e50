"""A measured run has the plan's actions, and activations take what the plan says."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from pipe_models import loss_fn
from torch import nn

from ds_comm.testing import run_ranks
from ds_pipe import (
    Costs,
    LayerSpec,
    Measured,
    Memory,
    PipelineModule,
    build,
    measure_memory,
    measure_run,
    pipeline,
    simulate,
    to_svg,
    to_text,
    to_trace,
)

SIZE = 64


def layers() -> list[Any]:
    block = [LayerSpec(nn.Linear, SIZE, SIZE), LayerSpec(nn.Tanh), LayerSpec(nn.LayerNorm, SIZE)]
    return [*block * 6, LayerSpec(nn.Linear, SIZE, SIZE)]


def measured(
    schedule: str, num_micro_batches: int, checkpointing: int, rows: int = 16
) -> tuple[Measured, Memory, tuple[int, ...]]:
    options: dict[str, Any] = {"zb_v": {"num_chunks": 2, "placement": "v"}, "interleaved": {"num_chunks": 2}}
    module = PipelineModule(
        layers(), loss_fn=loss_fn, activation_checkpoint_interval=checkpointing, **options.get(schedule, {})
    )
    pipe = pipeline(module, schedule=schedule, num_micro_batches=num_micro_batches)
    batch = (torch.ones(rows, 8, SIZE), torch.zeros(rows, 8, SIZE))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    pipe.train_batch(itertools.repeat(batch), optimizer)
    run = measure_run(pipe, itertools.repeat(batch), optimizer)
    assert not pipe.observers
    return run, measure_memory(pipe, itertools.repeat(batch), optimizer), pipe.schedule.peak_live


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"])
def test_run_and_memory(schedule: str) -> None:
    found = run_ranks(measured, 2, schedule, 5, 0)
    run, memory, peak_live = found[0]
    assert found[1] == found[0]
    plan = build(schedule, 2, 5)
    assert [[span.action for span in spans] for spans in run.spans] == [list(actions) for actions in plan.actions]
    for spans in run.spans:
        assert all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
    for stage, peak in enumerate(memory.peak):
        assert peak <= 1.05 * memory.predicted[stage]
        assert peak >= 0.5 * memory.predicted[stage]
        # A micro-batch of a chunk keeps at least the inputs of its Linear layers and norms.
        smallest = min(memory.activation[virtual] for virtual in plan.chunks[stage])
        assert peak_live[stage] * smallest <= 1.05 * memory.predicted[stage]
        assert smallest >= 6 // plan.num_chunks * 16 * 8 * SIZE * 4
    simulation = simulate(plan, Costs.from_measured(run, plan))
    assert simulation.makespan > 0
    assert "run " in to_text(simulation, run) and "<svg" in to_svg(simulation, run)
    assert len(json.loads(to_trace(simulation, run))["traceEvents"]) > 2 * plan.num_actions


def test_checkpointing_holds_less() -> None:
    (_, kept, _), (_, recomputed, _) = run_ranks(measured, 2, "1f1b", 3, 0)[0], run_ranks(measured, 2, "1f1b", 3, 3)[0]
    assert all(less < 0.7 * more for less, more in zip(recomputed.peak, kept.peak, strict=True))


def test_gradients_of_weights_are_no_activations() -> None:
    _, memory, _ = run_ranks(measured, 2, "zb_h1", 3, 0, 1)[0]
    weights_of_a_stage = 6 * SIZE * SIZE * 4
    assert memory.peak[0] <= 1.05 * memory.predicted[0] < weights_of_a_stage  # it runs each I with its W
