"""Upstream's accessors: present on the class, typed as methods, and reading what the config says."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch

from deepspeed.config import ConfigGetters, resolve

NAMES = [name for name in vars(ConfigGetters) if not name.startswith("_")]


class Engine(ConfigGetters):
    def __init__(self, **keys: Any) -> None:
        self._config = resolve({"train_batch_size": 8, **keys}, dp_world_size=2)


def test_there_are_as_many_as_upstream_has() -> None:
    assert len(NAMES) >= 120


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_plain_documented_method(name: str) -> None:
    function = inspect.getattr_static(ConfigGetters, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name and function.__doc__
    assert list(inspect.signature(getattr(Engine(), name)).parameters) == []
    getattr(Engine(), name)()


def test_autospec_sees_them() -> None:
    engine = mock.create_autospec(Engine, instance=True)
    engine.zero_optimization_stage.return_value = 3
    assert engine.zero_optimization_stage() == 3
    with pytest.raises(TypeError):
        engine.zero_optimization_stage(1)


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("train_batch_size", {}, 8),
        ("train_micro_batch_size_per_gpu", {}, 4),
        ("gradient_accumulation_steps", {"train_micro_batch_size_per_gpu": 2}, 2),
        ("steps_per_print", {"steps_per_print": 5}, 5),
        ("steps_per_print", {}, None),
        ("postscale_gradients", {"prescale_gradients": True}, False),
        ("gradient_clipping", {"gradient_clipping": 0.5}, 0.5),
        ("use_node_local_storage", {}, False),
        ("optimizer_name", {"optimizer": {"type": "SGD"}}, "SGD"),
        ("optimizer_params", {"optimizer": {"type": "SGD", "params": {"lr": 1}}}, {"lr": 1}),
        ("optimizer_name", {}, None),
        ("scheduler_params", {}, None),
        ("zero_optimization", {"zero_optimization": {"stage": 1}}, True),
        ("zero_optimization", {}, False),
        ("zero_optimization_partition_gradients", {"zero_optimization": {"stage": 1}}, False),
        ("zero_optimization_partition_gradients", {"zero_optimization": {"stage": 2}}, True),
        ("zero_optimization_partition_weights", {"zero_optimization": {"stage": 2}}, False),
        ("zero_optimization_partition_weights", {"zero_optimization": {"stage": 3}}, True),
        ("zero_prefetch_bucket_size", {"zero_optimization": {"prefetch_bucket_size": 3}}, 3),
        ("zero_offload_optimizer", {}, None),
        ("zero_partial_offload", {}, 1.0),
        ("zero_cpu_offload", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, True),
        ("zero_cpu_offload", {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, False),
        ("zero_nvme_offload_optimizer", {}, False),
        ("bfloat16_enabled", {"bfloat16": {"enabled": True}}, True),
        ("get_data_types", {"bf16": {"enabled": True}}, (torch.bfloat16, torch.bfloat16)),
        (
            "get_data_types",
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            (torch.bfloat16, torch.float32),
        ),
        ("torch_autocast_dtype", {"torch_autocast": {"dtype": "bfloat16"}}, torch.bfloat16),
        ("initial_dynamic_scale", {"fp16": {"initial_scale_power": 8}}, 256.0),
        ("dynamic_loss_scale_args", {"fp16": {"enabled": True, "loss_scale": 128}}, None),
        (
            "dynamic_loss_scale_args",
            {"fp16": {"enabled": True, "loss_scale_window": 10}},
            {
                "init_scale": 65536.0,
                "scale_window": 10,
                "min_scale": 1,
                "delayed_shift": 2,
                "consecutive_hysteresis": False,
            },
        ),
        ("checkpoint_tag_validation_enabled", {"checkpoint": {"tag_validation": "ignore"}}, False),
        ("checkpoint_tag_validation_fail", {"checkpoint": {"tag_validation": "Fail"}}, True),
        ("pld_enabled", {}, False),
        ("mics_shard_size", {}, -1),
    ],
)
def test_values(name: str, keys: dict[str, Any], expected: Any) -> None:
    assert getattr(Engine(**keys), name)() == expected
