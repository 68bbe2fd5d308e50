"""Small helpers under upstream's paths: its values, and its names of arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.checkpoint import utils as names
from deepspeed.monitor.config import get_monitor_config
from deepspeed.runtime.utils import PartitionedTensor
from deepspeed.utils import numa
from ds_comm.testing import run_ranks

SIGNATURES = {
    "deepspeed.utils.safe_get_full_fp32_param": "param",
    "deepspeed.utils.safe_get_full_grad": "param",
    "deepspeed.utils.safe_get_full_optimizer_state": "param optim_state_key",
    "deepspeed.utils.safe_set_full_fp32_param": "param value",
    "deepspeed.utils.safe_set_full_grad": "param value",
    "deepspeed.utils.safe_set_full_optimizer_state": "param value optim_state_key",
    "deepspeed.utils.safe_get_local_optimizer_state": "param optim_state_key",
    "deepspeed.utils.safe_set_local_optimizer_state": "param value optim_state_key",
    "deepspeed.utils.safe_update_full_grad_vectorized": "param_list update_func",
    "deepspeed.utils.set_z3_leaf_modules": "model leaf_module_classes raise_if_not_found",
    "deepspeed.utils.unset_z3_leaf_modules": "model leaf_module_classes raise_if_not_found",
    "deepspeed.utils.z3_leaf_module.set_z3_leaf_modules_by_name": "model module_names flag raise_if_not_found",
    "deepspeed.utils.z3_leaf_module.set_z3_leaf_modules_by_suffix": (
        "model module_name_suffixes flag raise_if_not_found"
    ),
    "deepspeed.accelerator.set_accelerator": "accel_obj",
    "deepspeed.comm.allgather_fn": "output_tensor input_tensor group async_op debug",
    "deepspeed.comm.reduce_scatter_fn": "output_tensor tensor op group async_op prof debug",
    "deepspeed.comm.log_summary": "show_straggler return_dict",
    "deepspeed.launcher.runner.fetch_hostfile": "hostfile_path",
    "deepspeed.runtime.utils.CheckOverflow": "param_groups mpu zero_reduce_scatter deepspeed",
    "deepspeed.runtime.utils.see_memory_usage": "message force",
    "deepspeed.runtime.utils.clip_grad_norm_": "parameters max_norm norm_type mpu",
    "deepspeed.init_inference": "model config",
    "deepspeed.tp_model_init": "model tp_size dtype config",
    "deepspeed.initialize": (
        "args model optimizer model_parameters training_data lr_scheduler distributed_port mpu dist_init_required "
        "collate_fn config mesh_param config_params"
    ),
    "deepspeed.zero.GatheredParameters": "params modifier_rank fwd_module enabled",
    "deepspeed.DeepSpeedEngine.backward": "self loss retain_graph scale_wrt_gas",
    "deepspeed.DeepSpeedEngine.step": "self lr_kwargs",
    "deepspeed.DeepSpeedEngine.offload_states": "self include device pin_memory non_blocking",
    "deepspeed.DeepSpeedEngine.reload_states": "self non_blocking",
    "deepspeed.DeepSpeedEngine.save_checkpoint": "self save_dir tag client_state save_latest exclude_frozen_parameters",
}
"""Path -> arguments that upstream's callers give by name."""


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_have_upstreams_names(path: str) -> None:
    found: Any = deepspeed
    for name in path.split(".")[1:]:
        found = getattr(found, name) if hasattr(found, name) else __import__(path.rpartition(".")[0], fromlist=[name])
    if inspect.isfunction(found) and path.startswith("deepspeed.utils.z3_leaf_module"):  # a function bears that name
        found = inspect.getmodule(found)
    if inspect.ismodule(found):
        found = getattr(found, path.rpartition(".")[2])
    assert list(inspect.signature(found).parameters)[: len(SIGNATURES[path].split())] == SIGNATURES[path].split()


def test_names_of_upstreams_files() -> None:
    assert names.get_model_ckpt_name_for_rank("d", "00") == "d/mp_rank_00_model_states.pt"
    assert names.get_zero_ckpt_name_for_rank("d", 3, 1) == "d/zero_pp_rank_3_mp_rank_01_optim_states.pt"
    assert names.get_layer_ckpt_name_for_rank("d", 4, 2) == "d/4-model_02_model_states.pt"
    assert deepspeed.checkpoint.UNIVERSAL_CHECKPOINT_VERSION_VALUE == 0.4
    assert deepspeed.checkpoint.FP32_WEIGHT_KEY == "fp32" and deepspeed.checkpoint.PARAM_SHAPES == "param_shapes"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("0-3", 2, 0), (2, "0-1")),
        (("0-3", 2, 1), (2, "2-3")),
        (("0,2-4", 2, 1), (2, "3-4")),
        (("0,2,4", 3, 1), (1, "2")),
        (("0,2-4", 1, 0), (4, "0,2-4")),
    ],
)
def test_cores_are_shared_out(arguments: tuple[str, int, int], expected: tuple[int, str]) -> None:
    assert numa.get_numactl_cmd(*arguments) == (expected[0], ["numactl", "-C", expected[1]])


@pytest.mark.parametrize(
    ("text", "ranks", "words"),
    [
        ("0-", 1, "neither a core"),
        ("3-1", 1, "ends before"),
        ("0,0", 1, "twice"),
        ("0,1", 3, "2 cores cannot be shared"),
    ],
)
def test_core_lists_that_make_no_sense(text: str, ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        numa.get_numactl_cmd(text, ranks, 0)


def test_leaf_modules_by_name_say_what_is_missing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    leaves = deepspeed.utils.set_z3_leaf_modules_by_suffix(model, ["a"])
    assert leaves == ([model["a"], model["b"]["a"]], [])
    found = deepspeed.utils.set_z3_leaf_modules_by_name(model, ["a", "c"], flag=False, raise_if_not_found=False)
    assert found == ([model["a"]], ["c"])
    assert deepspeed.utils.get_z3_leaf_modules(model) == [model["b"]["a"]]
    with pytest.raises(ValueError, match="no module named 'c'"):
        deepspeed.utils.set_z3_leaf_modules_by_name(model, ["c"])


def test_monitors_sections() -> None:
    config = get_monitor_config({"csv_monitor": {"enabled": True, "job_name": "x"}, "train_batch_size": 3})
    assert config.enabled and config.csv_monitor.job_name == "x" and not config.tensorboard.enabled
    assert not get_monitor_config({}).enabled


def pieces(shape: tuple[int, ...]) -> Any:
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    one = PartitionedTensor(whole)
    other = PartitionedTensor.from_meta(one.to_meta(), one.data(), None)
    again = PartitionedTensor(whole * 2, partition_meta=one.to_meta())
    assert torch.equal(one.full(), whole) and torch.equal(other.full(), whole) and torch.equal(again.full(), whole * 2)
    with pytest.raises(ValueError, match="has 99 elements"):
        PartitionedTensor.from_meta(one.to_meta(), torch.zeros(99), None)
    with pytest.raises(ValueError, match="the group has"):
        PartitionedTensor.from_meta(torch.tensor([1, 4, 9, 0, 0, 4]), torch.zeros(4), None)
    return one.to_meta().tolist(), one.data().tolist(), list(one.local_size()), one.full_size()


def test_a_partitioned_tensor_has_upstreams_description() -> None:
    assert run_ranks(pieces, 2, (2, 7)) == [
        ([2, 2, 7, 2, 0, 0, 7, 14], [float(i) for i in range(7)], [7], [2, 7]),
        ([2, 2, 7, 2, 1, 0, 7, 14], [float(i) for i in range(7, 14)], [7], [2, 7]),
    ]
    assert [found[2] for found in run_ranks(pieces, 3, (5,))] == [[2], [2], [1]]
