"""From the JSON config to ds_zero's: which key of which section becomes which field of `ZeroConfig`."""

from __future__ import annotations

from typing import Any

from deepspeed.config.model_precision import Fp16
from deepspeed.config.resolved import ResolvedConfig
from ds_zero.config import LossScaleConfig, ZeroConfig

__all__ = ["zero_config"]


def zero_config(config: ResolvedConfig) -> ZeroConfig:
    """The ds_zero config of a resolved config.

    What upstream defaults in a way that costs memory here (`stage3_max_reuse_distance`) is passed on only where the
    user set it. A model that is neither fp16 nor bf16 keeps the dtypes of its parameters.
    """
    zero = config.zero_optimization
    low_precision = config.model_dtype != "fp32"
    chosen: dict[str, Any] = {}
    if config.given("data_types.grad_accum_dtype"):
        chosen["grad_accum_dtype"] = config.data_types.grad_accum_dtype
    if config.given("zero_optimization.stage3_max_reuse_distance"):
        chosen["max_reuse_distance"] = zero.stage3_max_reuse_distance
    return ZeroConfig(
        stage=zero.stage,
        dtype=config.model_dtype if low_precision else None,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_reduction=config.gradient_allreduce_op,
        gradient_clipping=config.gradient_clipping,
        check_nonfinite=config.bf16.check_grad_overflow if config.bf16.enabled else True,
        loss_scaling=_loss_scaling(config.fp16),
        overlap_comm=zero.overlap_comm,
        reduce_scatter=zero.reduce_scatter,
        reduce_bucket_size=zero.reduce_bucket_size,
        allgather_bucket_size=zero.allgather_bucket_size,
        sub_group_size=zero.sub_group_size,
        ignore_unused_parameters=zero.ignore_unused_parameters,
        prefetch_bucket_size=0 if zero.stage3_allgather_sequential else zero.stage3_prefetch_bucket_size,
        param_persistence_threshold=zero.stage3_param_persistence_threshold,
        model_persistence_threshold=zero.stage3_model_persistence_threshold,
        max_live_parameters=zero.stage3_max_live_parameters,
        **chosen,
    )


def _loss_scaling(fp16: Fp16) -> LossScaleConfig:
    """fp16's keys; the ones of dynamic scaling only where it is on."""
    if not fp16.dynamic:
        return LossScaleConfig(loss_scale=fp16.loss_scale)
    return LossScaleConfig(
        initial_scale_power=fp16.initial_scale_power,
        loss_scale_window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_loss_scale=fp16.min_loss_scale,
    )
