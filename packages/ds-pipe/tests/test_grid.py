"""The groups of a grid, made on real ranks; and who shares what by upstream's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import (
    LayerSpec,
    PipeDataParallelTopology,
    PipelineError,
    PipelineModule,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
)


def answers(kind: type[ProcessTopology] | None, sizes: dict[str, int]) -> dict[str, Any]:
    grid = PipelineParallelGrid(None if kind is None else kind(**sizes))
    found: dict[str, Any] = {"stage": grid.get_stage_id(), "replica": grid.get_data_parallel_id()}
    for axis in ("pipe", "data", "model", "slice", "pipeline_model", "tensor_model"):
        group = getattr(grid, f"get_{axis}_parallel_group")()
        rank = getattr(grid, f"get_{axis}_parallel_rank")()
        ranks = ds_comm.get_all_ranks_from_group(group)
        assert ranks[rank] == grid.get_global_rank() == ds_comm.get_rank()
        assert getattr(grid, f"get_{axis}_parallel_world_size")() == len(ranks)
        total = torch.tensor([float(ds_comm.get_rank())])
        ds_comm.all_reduce(total, group=group)
        assert total.item() == sum(ranks)
        found[axis] = ranks
    assert grid.get_data_parallel_group_ranks() == found["data"]
    found["next"] = grid.stage_to_global((grid.get_stage_id() + 1) % grid.pipe_parallel_size)
    assert grid.p2p_groups[ds_comm.get_rank()] == [ds_comm.get_rank(), found["next"]]
    return found


def test_stages_and_replicas() -> None:
    for rank, found in enumerate(run_ranks(answers, 4, PipeDataParallelTopology, {"num_pp": 2, "num_dp": 2})):
        stage, replica = divmod(rank, 2)
        pipe, data = [replica, replica + 2], [2 * stage, 2 * stage + 1]
        assert found == {
            "stage": stage,
            "replica": replica,
            "pipe": pipe,
            "pipeline_model": pipe,
            "data": data,
            "model": pipe,
            "slice": [rank],
            "tensor_model": [rank],
            "next": (rank + 2) % 4,
        }


def test_an_axis_of_tensor_parallel_ranks() -> None:
    found = run_ranks(answers, 4, PipeModelDataParallelTopology, {"num_pp": 2, "num_mp": 2, "num_dp": 1})
    assert [one["slice"] for one in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(one["model"] == [0, 1, 2, 3] for one in found)
    assert [one["data"] for one in found] == [[0], [1], [2], [3]]


def test_without_a_topology_all_ranks_are_replicas() -> None:
    assert [one["data"] for one in run_ranks(answers, 3, None, {})] == [[0, 1, 2]] * 3


def wrong_sizes() -> str:
    with pytest.raises(PipelineError, match="the topology has 4 ranks") as caught:
        PipelineParallelGrid(PipeDataParallelTopology(2, 2))
    return str(caught.value)


def test_a_topology_of_another_size_is_an_error() -> None:
    assert all("the world has 3" in text for text in run_ranks(wrong_sizes, 3))


def replicas_of_a_module(num_stages: int) -> tuple[int, list[int], str]:
    layers = [LayerSpec(nn.Linear, 3, 3) for _ in range(4)]
    module = PipelineModule(layers, num_stages=num_stages, partition_method="uniform")
    grid = module.mpu()
    assert module.mpu() is grid and module.topology().world_size() == 4
    text = ""
    try:
        PipelineModule(layers, num_stages=3)
    except PipelineError as error:
        text = str(error)
    return module.stage_id, grid.get_data_parallel_group_ranks(), text


def test_more_ranks_than_stages_are_replicas() -> None:
    for rank, (stage, data, text) in enumerate(run_ranks(replicas_of_a_module, 4, 2)):
        assert stage == rank // 2 and data == [2 * stage, 2 * stage + 1]
        assert text.startswith("num_stages is 3, but there are 4 ranks")
    for rank, (stage, data, _) in enumerate(run_ranks(replicas_of_a_module, 4, 4)):
        assert stage == rank and data == [rank]
