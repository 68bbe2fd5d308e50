"""The config of ds_zero that a JSON config leads to."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import resolve
from deepspeed.config.translate import zero_config
from ds_zero.config import ZeroConfig


def made(**keys: Any) -> ZeroConfig:
    return zero_config(resolve({"train_batch_size": 8, **keys}, dp_world_size=2))


def zero(**keys: Any) -> ZeroConfig:
    return made(zero_optimization=keys)


@pytest.mark.parametrize(
    ("field", "config", "expected"),
    [
        ("stage", {"zero_optimization": {"stage": 3}}, 3),
        ("dtype", {}, None),
        ("dtype", {"bf16": {"enabled": True}}, "bf16"),
        ("dtype", {"fp16": {"enabled": True}}, "fp16"),
        ("grad_accum_dtype", {"bf16": {"enabled": True}}, None),
        ("grad_accum_dtype", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "fp32"),
        ("gradient_accumulation_steps", {"train_micro_batch_size_per_gpu": 1}, 4),
        ("gradient_reduction", {"gradient_allreduce_op": "sum"}, "sum"),
        ("gradient_clipping", {"gradient_clipping": 0.25}, 0.25),
        ("check_nonfinite", {"bf16": {"enabled": True, "check_grad_overflow": False}}, False),
        ("check_nonfinite", {"fp16": {"enabled": True}, "bf16": {"check_grad_overflow": False}}, True),
        ("overlap_comm", {"zero_optimization": {"overlap_comm": False}}, False),
        ("reduce_scatter", {"zero_optimization": {"reduce_scatter": False}}, False),
        ("reduce_bucket_size", {"zero_optimization": {"reduce_bucket_size": 5e3}}, 5000),
        ("allgather_bucket_size", {"zero_optimization": {"allgather_bucket_size": 6e3}}, 6000),
        ("sub_group_size", {"zero_optimization": {"sub_group_size": 7}}, 7),
        ("ignore_unused_parameters", {"zero_optimization": {"ignore_unused_parameters": False}}, False),
        ("prefetch_bucket_size", {"zero_optimization": {"prefetch_bucket_size": 9}}, 9),
        ("prefetch_bucket_size", {"zero_optimization": {"stage3_allgather_sequential": True}}, 0),
        ("param_persistence_threshold", {"zero_optimization": {"stage3_param_persistence_threshold": 0}}, 0),
        ("model_persistence_threshold", {"zero_optimization": {"model_persistence_threshold": 11}}, 11),
        ("max_live_parameters", {"zero_optimization": {"stage3_max_live_parameters": 12}}, 12),
        ("max_reuse_distance", {"zero_optimization": {"stage3_max_reuse_distance": 13}}, 13),
        ("max_reuse_distance", {}, ZeroConfig().max_reuse_distance),
    ],
)
def test_fields(field: str, config: dict[str, Any], expected: Any) -> None:
    assert getattr(made(**config), field) == expected


def test_loss_scaling() -> None:
    dynamic = made(
        fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 5, "hysteresis": 1}
    ).loss_scaling
    assert (dynamic.loss_scale, dynamic.initial_scale_power, dynamic.loss_scale_window, dynamic.hysteresis) == (
        0,
        4,
        5,
        1,
    )
    static = made(fp16={"enabled": True, "loss_scale": 128, "loss_scale_window": 0}).loss_scaling
    assert static.loss_scale == 128


def test_all_fields_of_ds_zero_can_be_reached() -> None:
    default = made().model_dump()
    settable_elsewhere = {"skip_nonfinite"}  # no JSON key of upstream
    assert set(default) - settable_elsewhere == {
        "stage", "dtype", "grad_accum_dtype", "gradient_accumulation_steps", "gradient_reduction", "gradient_clipping",
        "check_nonfinite", "loss_scaling", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
        "allgather_bucket_size", "sub_group_size", "ignore_unused_parameters", "prefetch_bucket_size",
        "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
    }  # fmt: skip
