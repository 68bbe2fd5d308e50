"""Groups by role: the mpu's where it has them, a data-parallel job's otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import ds_comm
from deepspeed.utils import groups
from ds_comm.testing import run_ranks


def without_mpu() -> dict[str, object]:
    groups.mpu = None  # an engine that failed in this process may have left its own
    alone = groups._get_sequence_parallel_group()
    same = alone is groups._get_model_parallel_group()
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=alone)
    groups._self_group = None
    return {
        "data": (groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()),
        "ranks": groups._get_data_parallel_group_ranks(),
        "src": (groups._get_broadcast_src_rank(), groups.get_tensor_model_parallel_src_rank()),
        "model": (groups.get_model_parallel_rank(), groups.get_model_parallel_world_size()),
        "sequence": (groups._get_sequence_parallel_rank(), groups._get_sequence_parallel_world_size()),
        "sequence data": groups._get_sequence_data_parallel_world_size(),
        "alone": (same, total.item()),
    }


def test_a_data_parallel_job() -> None:
    groups._self_group = None
    for rank, found in enumerate(run_ranks(without_mpu, 2)):
        assert found == {
            "data": (rank, 2),
            "ranks": [0, 1],
            "src": (0, rank),
            "model": (0, 1),
            "sequence": (0, 1),
            "sequence data": 2,
            "alone": (True, 1.0),
        }


def with_mpu() -> tuple[object, ...]:
    """Two ranks share each sequence: the mpu knows sequence groups and nothing else."""
    pairs = [ds_comm.new_group([0, 1]), ds_comm.new_group([2, 3])]
    rank = ds_comm.get_rank()
    groups.mpu = SimpleNamespace(
        get_sequence_parallel_group=lambda: pairs[rank // 2],
        get_sequence_parallel_world_size=lambda: 2,
        get_sequence_parallel_rank=lambda: rank % 2,
    )
    try:
        total = torch.tensor([float(rank)])
        torch.distributed.all_reduce(total, group=groups._get_sequence_parallel_group())
        return (
            groups._get_sequence_parallel_rank(),
            groups._get_sequence_parallel_world_size(),
            total.item(),
            groups.get_data_parallel_world_size(),
            groups.get_model_parallel_world_size(),
        )
    finally:
        groups.mpu = None


def test_sequence_parallel_groups_come_from_the_mpu() -> None:
    assert run_ranks(with_mpu, 4) == [(0, 2, 1, 4, 1), (1, 2, 1, 4, 1), (0, 2, 5, 4, 1), (1, 2, 5, 4, 1)]
