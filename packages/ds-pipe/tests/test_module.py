"""Layers and `PipelineModule`: what a stage builds, that its weights do not depend on the split, and clear refusals."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from pipe_models import MODELS, WIDTH, Unsplit, plain
from torch import nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import (
    LayerSpec,
    PartitionError,
    PipeDataParallelTopology,
    PipelineError,
    PipelineModule,
    TiedLayerSpec,
)


def stage_of(model: str, method: str) -> dict[str, Any]:
    module = PipelineModule(MODELS[model](), seed_layers=True, partition_method=method)
    return {
        "parts": module.parts,
        "bounds": (module.chunks[0].start, module.chunks[0].start + len(module.chunks[0].functions)),
        "state": module.state_dict(),
        "functions": len(module.forward_funcs),
        "map": module.fwd_map,
        "owners": [module.stage_owner(i) for i in range(module.parts[-1])],
    }


@pytest.mark.parametrize(("model", "method"), [("plain", "parameters"), ("plain", "type:linear"), ("tied", "uniform")])
def test_a_stage_builds_its_own_layers_only(model: str, method: str) -> None:
    whole = Unsplit(MODELS[model]()).state_dict()
    stages = run_ranks(stage_of, 2, model, method)
    assert stages[0]["parts"] == stages[1]["parts"]
    assert [stage["bounds"] for stage in stages] == list(zip(stages[0]["parts"], stages[0]["parts"][1:], strict=False))
    names = [set(stage["state"]) for stage in stages]
    assert names[0] | names[1] == set(whole)
    assert names[0] & names[1] == ({"tied_modules.embed.weight"} if model == "tied" else set())
    for stage in stages:
        start, stop = stage["bounds"]
        assert stage["functions"] == stop - start
        assert all(start + at == int(name) for name, at in stage["map"].items())
        assert all(torch.equal(value, whole[name]) for name, value in stage["state"].items())
    assert stages[0]["owners"] == [int(i >= stages[0]["parts"][1]) for i in range(stages[0]["parts"][-1])]


def on_a_grid() -> tuple[int, int, list[int]]:
    module = PipelineModule(plain(), topology=PipeDataParallelTopology(2, 1))
    return module.stage_id, module.num_pipeline_stages(), ds_comm.get_all_ranks_from_group(module.group)


def test_topology() -> None:
    assert run_ranks(on_a_grid, 2) == [(0, 2, [0, 1]), (1, 2, [0, 1])]


def data_parallel_only() -> tuple[int, int, tuple[int, ...]]:
    module = PipelineModule(plain(), topology=PipeDataParallelTopology(1, 2))
    return module.stage_id, module.num_stages, module.parts


def test_each_line_of_the_grid_is_a_pipeline() -> None:
    assert run_ranks(data_parallel_only, 2) == [(0, 1, (0, 10))] * 2


@pytest.fixture
def world() -> Any:
    ds_comm.init_distributed()
    yield
    ds_comm.destroy_process_group()


@pytest.mark.usefixtures("world")
class TestOneRank:
    def test_checkpointing_changes_no_bit(self) -> None:
        inputs = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
        found = []
        for interval in (0, 1, 3):
            module = PipelineModule(plain(), seed_layers=True, activation_checkpoint_interval=interval)
            module(inputs).sum().backward()
            found.append([parameter.grad for parameter in module.parameters()])
        for grads in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))

    def test_checkpointable_layers_select(self) -> None:
        calls = []

        def recording(function: Any, inputs: Any) -> Any:
            calls.append(function)
            return function(inputs)

        def run(**options: Any) -> int:
            calls.clear()
            module = PipelineModule(
                plain(2), activation_checkpoint_interval=1, activation_checkpoint_func=recording, **options
            )
            module(torch.ones(1, WIDTH))
            return len(calls)

        assert run() == 2  # the functions have no parameters
        assert run(checkpointable_layers=["Embedding"]) == 0
        assert run(checkpointable_layers=["Linear"]) == 2

    def test_profile_takes_costs(self) -> None:
        costs = [1.0] * 10
        module = PipelineModule(plain(), partition_method="profile", layer_costs=costs)
        assert module.parts == (0, 10)
        with pytest.raises(PartitionError, match="layer_costs has 3 entries; expected one per layer, 10"):
            PipelineModule(plain(), partition_method="profile", layer_costs=costs[:3])
        with pytest.raises(PartitionError, match="needs costs"):
            PipelineModule(plain(), partition_method="profile")

    def test_counting_parameters_draws_no_random_number(self) -> None:
        torch.manual_seed(3)
        expected = nn.Linear(4, 4).weight
        torch.manual_seed(3)
        module = PipelineModule([LayerSpec(nn.Linear, 4, 4)], partition_method="parameters")
        assert torch.equal(module.get_parameter("0.weight"), expected)

    def test_refusals(self) -> None:
        with pytest.raises(PipelineError, match="num_stages is 2, but there are 1 ranks"):
            PipelineModule(plain(), num_stages=2)
        with pytest.raises(PipelineError, match="the topology has 4 ranks and 2 on its axis 'pipe'"):
            PipelineModule(plain(), topology=PipeDataParallelTopology(2, 2))
        with pytest.raises(PartitionError, match="0 layers cannot fill 1 stages"):
            PipelineModule([])
        with pytest.raises(IndexError, match="layer 10 is not there; the model has 10 layers"):
            PipelineModule(plain()).stage_owner(10)


def test_specs() -> None:
    spec = LayerSpec(nn.Linear, 2, 3, bias=False)
    assert repr(spec) == "Linear(2, 3, bias=False)" and spec.build().weight.shape == (3, 2)
    assert TiedLayerSpec("k", nn.Linear, 2, 3, tied_weight_attr="bias").tied_weight_attr == ["bias"]
    with pytest.raises(TypeError, match="expected a class derived from"):
        LayerSpec(torch.tanh)  # type: ignore[arg-type]


def too_few() -> str:
    with pytest.raises(PartitionError) as info:
        PipelineModule([nn.Linear(2, 2)], partition_method="uniform")
    return str(info.value)


def test_fewer_layers_than_stages_fail_everywhere() -> None:
    assert all("1 layers cannot fill 2 stages" in text for text in run_ranks(too_few, 2))


class Slow(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().forward(inputs)


def measured_split() -> tuple[tuple[int, ...], list[float]]:
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4)] + [LayerSpec(Slow, WIDTH, WIDTH)]
    sample = (torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))
    module = PipelineModule(layers, loss_fn=nn.functional.mse_loss, partition_method="profile", profile_sample=sample)
    assert module.costs is not None
    return module.parts, list(module.costs.totals)


def test_profile_measures_by_itself() -> None:
    first, second = run_ranks(measured_split, 2)
    assert first == second
    assert first[0] == (0, 4, 5)


def foreign_layers() -> list[bool]:
    """Which layers live on after the list of all of them is gone."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    alive = [weakref.ref(layer) for layer in layers]
    module = PipelineModule(layers, partition_method="uniform")
    del layers
    gc.collect()
    assert module.num_layers == 4
    return [ref() is not None for ref in alive]


def test_a_rank_keeps_only_its_own_layers() -> None:
    assert run_ranks(foreign_layers, 2) == [[True, True, False, False], [False, False, True, True]]
