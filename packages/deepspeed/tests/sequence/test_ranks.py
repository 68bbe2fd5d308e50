"""Ranks that share sequences: groups, batch sizes, gradients and checkpoints of the engine, and batches in parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepspeed
import ds_comm
from deepspeed.planner import plan_run
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
from deepspeed.utils import groups
from ds_comm.testing import RankFailure, run_ranks


class Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def make(how: str, stage: int, **more: Any) -> Any:
    config: dict[str, Any] = {
        "train_batch_size": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    given: dict[str, Any] = {}
    if how == "module":
        parallel_state_sp.initialize_sequence_parallel(2)
        given["mpu"] = parallel_state_sp
    elif how == "config":
        config |= {"sequence_parallel_size": 2, "data_parallel_size": 2}
    elif how == "mesh":
        given["mesh_param"] = (2, 2)
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **given, **more)[0]


def train(how: str, stage: int, folder: Path) -> dict[str, Any]:
    samples = [(torch.tensor(float(i)),) for i in range(4)]
    engine = make(how, stage, training_data=samples)
    rank = ds_comm.get_rank()
    loss = engine(torch.full((4,), float(rank + 1)))
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(folder / how)
    engine.wait_for_checkpoint()
    assert engine.load_checkpoint(folder / how)[0] is not None
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        moved = (1 - engine.module.weight.detach()).tolist()
    found = {
        "moved": moved,
        "batch": (engine.train_micro_batch_size_per_gpu(), engine.dp_world_size, engine.seq_dp_world_size),
        "reads": [batch[0].item() for batch in engine.training_dataloader],
        "data": engine.get_data_parallel_rank(),
        "model": engine.mp_world_size,
        "place": (groups._get_sequence_parallel_rank(), groups._get_sequence_parallel_world_size()),
        "shares": ds_comm.get_all_ranks_from_group(groups._get_sequence_parallel_group()),
        "all": ds_comm.get_world_size(groups._get_sequence_data_parallel_group()),
    }
    engine.destroy()
    return found


def train_each(stage: int, folder: Path) -> list[dict[str, Any]]:
    return [train(how, stage, folder) for how in ("module", "config", "mesh")]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_ways_to_ask_for_two_ranks_a_sequence(stage: int, tmp_path: Path) -> None:
    results = run_ranks(train_each, 4, stage, tmp_path)
    reads = [results[rank][0]["reads"] for rank in range(4)]
    assert reads[0] == reads[1] != reads[2] == reads[3] and sorted(reads[0] + reads[2]) == [0, 1, 2, 3]
    for rank, each in enumerate(results):
        data, place = divmod(rank, 2)
        for found in each:
            assert found.pop("reads") == reads[rank]
            assert found == {
                "moved": [2.5] * 4,  # the mean over all ranks at every stage (upstream adds below stage 3)
                "batch": (1, 2, 4),
                "data": data,
                "model": 1,
                "place": (place, 2),
                "shares": [2 * data, 2 * data + 1],
                "all": 4,
            }


def conflicts() -> list[str]:
    def said(**given: Any) -> str:
        model = Sum()
        with pytest.raises(ValueError) as error:
            deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **given)
        return str(error.value)

    parallel_state_sp.initialize_sequence_parallel(2)
    parallel_state_sp.initialize_sequence_parallel(2)
    with pytest.raises(ValueError) as other:
        parallel_state_sp.initialize_sequence_parallel(1)
    parallel_state_sp._release_sequence_parallel_groups()
    with pytest.raises(ds_comm.CommError):
        parallel_state_sp.get_sequence_parallel_group()
    one = {"train_micro_batch_size_per_gpu": 1}
    counts = SimpleNamespace(
        get_data_parallel_group=ds_comm.get_world_group,
        get_data_parallel_world_size=lambda: 2,
        get_sequence_parallel_group=ds_comm.get_world_group,
        get_sequence_parallel_world_size=lambda: 2,
    )
    try:
        return [
            str(other.value),
            said(config=one, mesh_param=2),
            said(config=one, mesh_param=(2, 2)),
            said(config={**one, "sequence_parallel_size": 2}, mesh_param=(2, 1)),
            said(config=one, mpu=counts),
        ]
    finally:
        groups.mpu = None


def test_contradictions_are_said() -> None:
    expected = [
        "groups of 2 ranks exist",
        "mesh_param is 2",
        "do not make 2 ranks",
        "make them equal",
        "must not count",
    ]
    for found in run_ranks(conflicts, 2):
        assert all(part in text for part, text in zip(expected, found, strict=True)), found


def test_the_config_alone_knows_how_many_batches_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 4}
    assert DeepSpeedConfig(config).train_batch_size == 2


def test_a_plan_is_of_data_parallel_ranks() -> None:
    workload = SimpleNamespace(model=Sum())
    with pytest.raises(ValueError, match=r"sequence_parallel_size is 4: a plan knows data-parallel ranks only"):
        plan_run(workload, {"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 4}, world=8)


def deal() -> list[dict[str, Any]]:
    rank = ds_comm.get_rank()
    ids = torch.arange(5)[None] + 10 * rank
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 5), "name": f"row {rank}"}
    if rank:
        batch["pixels"] = torch.full((2, 3), 0.5)
    parts = UlyssesSPDataLoaderAdapter([batch], rank, ds_comm.get_world_group(), 2, "cpu")
    return [
        {key: value.tolist() if hasattr(value, "tolist") else value for key, value in part.items()} for part in parts
    ]


def test_batches_are_dealt_in_parts() -> None:
    first, second = run_ranks(deal, 2)
    assert [part["name"] for part in first] == ["row 0", "row 1"] == [part["name"] for part in second]
    assert [part["input_ids"] for part in first] == [[[0, 1, 2]], [[10, 11, 12]]]
    assert [part["input_ids"] for part in second] == [[[3, 4]], [[13, 14]]]
    assert [part["shift_labels"] for part in first] == [[[1, 2, 3]], [[11, 12, 13]]]
    assert [part["shift_labels"] for part in second] == [[[4, -100]], [[14, -100]]]
    assert [part["position_ids"] for part in second] == [[[3, 4]]] * 2
    assert "labels" not in first[0] and "pixels" not in first[0]
    assert first[1]["pixels"] == [[0.5] * 3] * 2 == second[1]["pixels"]


def without_labels() -> None:
    batch = {"input_ids": torch.zeros(1, 4)} | ({"labels": torch.zeros(1, 4)} if ds_comm.get_rank() else {})
    next(iter(UlyssesSPDataLoaderAdapter([batch], ds_comm.get_rank(), ds_comm.get_world_group(), 2, "cpu")))


def test_a_bad_batch_of_one_rank_is_an_error_of_all() -> None:
    with pytest.raises(
        RankFailure, match=r"rank 0 of those that share sequences: no labels; it has input_ids"
    ) as error:
        run_ranks(without_labels, 2)
    assert str(error.value).count("no labels") >= 2
