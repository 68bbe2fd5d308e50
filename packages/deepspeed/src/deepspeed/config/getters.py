"""Upstream's config accessors on the engine (`engine.zero_optimization_stage()`, ...), as one table in a mixin.

Each entry of the class body below is a method without arguments, made from a dotted path into the resolved config
(`_read`), a function of it (`_from`), or the fixed value of a feature that is not there (`_fixed`). They are plain
functions in the class, so `help`, autospec and subclassing see ordinary methods, and type checkers see `() -> T`.

The class that mixes this in has the `ResolvedConfig` as `_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Protocol, TypeVar, cast

import torch

from deepspeed.config.base import Section
from deepspeed.config.resolved import ResolvedConfig

__all__ = ["TORCH_DTYPES", "ConfigGetters"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class _Getter(Protocol[T_co]):
    """What a function in a class is to type checkers: bound, it takes nothing and returns T."""

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[[], T_co]: ...


def _from(function: Callable[[ResolvedConfig], T], doc: str) -> _Getter[T]:
    def getter(self: Any) -> T:
        return function(self._config)

    getter.__doc__ = doc
    return cast("_Getter[T]", getter)


def _read(path: str, kind: type[T]) -> _Getter[T]:
    """Read `path`, whose value is a `kind`."""
    read = attrgetter(path)
    return _from(lambda config: cast("T", read(config)), f"`{path}` of the config.")


def _optional(path: str, kind: type[T], default: T | None = None) -> _Getter[T | None]:
    """Read `path`, which may be none or lie in a block that was not given; then it is `default`."""

    def read(config: ResolvedConfig) -> T | None:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name, None)
        return default if value is None else cast("T", value)

    return _from(read, f"`{path}` of the config, {default!r} when not given.")


def _fixed(value: T, why: str) -> _Getter[T]:
    return _from(lambda config: value, f"Always {value!r}: {why}.")


def _offload_device(config: ResolvedConfig) -> str:
    section = config.zero_optimization.offload_optimizer
    return "none" if section is None or config.zero_optimization.stage == 0 else section.device


def _dynamic_loss_scale_args(config: ResolvedConfig) -> dict[str, float] | None:
    fp16 = config.fp16
    if not (fp16.enabled and fp16.dynamic):
        return None
    return {
        "init_scale": fp16.initial_scale,
        "scale_window": fp16.loss_scale_window,
        "min_scale": fp16.min_loss_scale,
        "delayed_shift": fp16.hysteresis,
        "consecutive_hysteresis": fp16.consecutive_hysteresis,
    }


def _data_types(config: ResolvedConfig) -> tuple[torch.dtype, torch.dtype]:
    return TORCH_DTYPES[config.model_dtype], TORCH_DTYPES[config.data_types.grad_accum_dtype or config.model_dtype]


def _autocast_dtype(config: ResolvedConfig) -> torch.dtype | None:
    name = config.torch_autocast.dtype
    return TORCH_DTYPES[name] if name is not None else None


def _section(path: str) -> _Getter[dict[str, Any]]:
    read = attrgetter(path)
    return _from(lambda config: cast("Section", read(config)).model_dump(), f"`{path}` of the config as a dict.")


_GONE = "the feature is not there (see the support table)"
_LATER = "the feature comes later (see the support table)"
_PASSES = "engine.compile() has no compiler passes"
_ZERO = "zero_optimization"
_STAGE3 = f"{_ZERO}.stage3_"


class ConfigGetters:
    """Upstream's accessors: one method per config value."""

    _config: ResolvedConfig

    # batch and steps
    train_batch_size = _read("train_batch_size", int)
    train_micro_batch_size_per_gpu = _read("train_micro_batch_size_per_gpu", int)
    gradient_accumulation_steps = _read("gradient_accumulation_steps", int)
    managed_gradient_accumulation = _read("managed_gradient_accumulation", bool)
    steps_per_print = _optional("steps_per_print", float)
    dataloader_drop_last = _read("dataloader_drop_last", bool)
    postscale_gradients = _from(lambda config: not config.prescale_gradients, "Not `prescale_gradients`.")
    gradient_predivide_factor = _read("gradient_predivide_factor", float)
    gradient_clipping = _read("gradient_clipping", float)
    dump_state = _read("dump_state", bool)
    memory_breakdown = _read("memory_breakdown", bool)
    wall_clock_breakdown = _read("wall_clock_breakdown", bool)
    sparse_gradients_enabled = _fixed(False, _GONE)
    use_node_local_storage = _read("checkpoint.use_node_local_storage", bool)
    load_universal_checkpoint = _read("checkpoint.load_universal", bool)
    is_sanity_checks_enabled = _read(f"{_ZERO}.enable_sanity_checks", bool)

    # optimizer and scheduler
    optimizer_name = _optional("optimizer.type", str)
    optimizer_params = _optional("optimizer.params", dict[str, Any])
    optimizer_legacy_fusion = _optional("optimizer.legacy_fusion", bool, default=False)
    scheduler_name = _optional("scheduler.type", str)
    scheduler_params = _optional("scheduler.params", dict[str, Any])
    zero_allow_untested_optimizer = _read("zero_allow_untested_optimizer", bool)
    zero_force_ds_cpu_optimizer = _read("zero_force_ds_cpu_optimizer", bool)
    cpuadam_cores_perc = _optional(f"{_ZERO}.offload_optimizer.cpuadam_cores_perc", float, default=0.9)
    super_offload = _optional(f"{_ZERO}.offload_optimizer.super_offload", bool, default=False)
    zenflow_config = _fixed(None, _LATER)

    # precision
    fp16_enabled = _read("fp16.enabled", bool)
    fp16_auto_cast = _read("fp16.auto_cast", bool)
    fp16_master_weights_and_gradients = _read("fp16.fp16_master_weights_and_grads", bool)
    bfloat16_enabled = _read("bf16.enabled", bool)
    bf16_master_weights_and_gradients = _read("bf16.bf16_master_weights_and_grads", bool)
    bf16_optimizer_states = _read("bf16.bf16_optimizer_states", bool)
    amp_enabled = _fixed(False, _GONE)
    amp_params = _from(lambda config: cast("dict[str, Any]", {}), "Always empty: the feature is not there.")
    torch_autocast_enabled = _read("torch_autocast.enabled", bool)
    torch_autocast_dtype = _from(_autocast_dtype, "`torch_autocast.dtype` as a torch dtype, None for the device's own.")
    torch_autocast_lower_precision_safe_modules = _optional(
        "torch_autocast.lower_precision_safe_modules", tuple[str, ...]
    )
    loss_scale = _read("fp16.loss_scale", float)
    initial_dynamic_scale = _from(lambda config: 2.0**config.fp16.initial_scale_power, "2 to `initial_scale_power`.")
    dynamic_loss_scale_args = _from(_dynamic_loss_scale_args, "Arguments of the dynamic scaler, None without one.")
    get_data_types = _from(_data_types, "(model dtype, gradient accumulation dtype) as torch dtypes.")

    # ZeRO
    zero_optimization = _from(lambda config: config.zero_optimization.stage > 0, "Whether the stage is above 0.")
    zero_optimization_stage = _read(f"{_ZERO}.stage", int)
    zero_optimization_partition_gradients = _from(lambda config: config.zero_optimization.stage >= 2, "Stage 2 or 3.")
    zero_optimization_partition_weights = _from(lambda config: config.zero_optimization.stage >= 3, "Stage 3.")
    zero_reduce_scatter = _read(f"{_ZERO}.reduce_scatter", bool)
    zero_overlap_comm = _read(f"{_ZERO}.overlap_comm", bool)
    zero_offload_optimizer = _optional(f"{_ZERO}.offload_optimizer", Section)
    zero_offload_param = _optional(f"{_ZERO}.offload_param", Section)
    zero_use_cpu_optimizer = _from(lambda config: _offload_device(config) in ("cpu", "nvme"), "Optimizer on the CPU.")
    zero_cpu_offload = _from(lambda config: _offload_device(config) == "cpu", "Optimizer state in host memory.")
    zero_partial_offload = _optional(f"{_ZERO}.offload_optimizer.ratio", float, default=1.0)
    zero_sub_group_size = _read(f"{_ZERO}.sub_group_size", int)
    zero_reduce_bucket_size = _read(f"{_ZERO}.reduce_bucket_size", int)
    zero_multi_rank_bucket_allreduce = _read(f"{_ZERO}.use_multi_rank_bucket_allreduce", bool)
    zero_allgather_bucket_size = _read(f"{_ZERO}.allgather_bucket_size", int)
    zero_allgather_partitions = _read(f"{_ZERO}.allgather_partitions", bool)
    zero_allgather_sequential = _read(f"{_STAGE3}allgather_sequential", bool)
    zero_contiguous_gradients = _read(f"{_ZERO}.contiguous_gradients", bool)
    zero_round_robin_gradients = _read(f"{_ZERO}.round_robin_gradients", bool)
    zero_load_from_fp32_weights = _read(f"{_ZERO}.load_from_fp32_weights", bool)
    zero_elastic_checkpoint = _read(f"{_ZERO}.elastic_checkpoint", bool)
    zero_nvme_offload_optimizer = _from(lambda config: _offload_device(config) == "nvme", "Optimizer state on nvme.")
    zero_max_live_parameters = _read(f"{_STAGE3}max_live_parameters", int)
    zero_max_reuse_distance = _read(f"{_STAGE3}max_reuse_distance", int)
    zero_prefetch_bucket_size = _read(f"{_STAGE3}prefetch_bucket_size", int)
    zero_module_granularity_threshold = _read(f"{_STAGE3}module_granularity_threshold", int)
    zero_param_persistence_threshold = _read(f"{_STAGE3}param_persistence_threshold", int)
    zero_model_persistence_threshold = _read(f"{_STAGE3}model_persistence_threshold", int)
    zero_gather_16bit_weights_on_model_save = _read(f"{_STAGE3}gather_16bit_weights_on_model_save", bool)
    zero_legacy_stage1 = _read(f"{_ZERO}.legacy_stage1", bool)
    zero_ignore_unused_parameters = _read(f"{_ZERO}.ignore_unused_parameters", bool)
    zero_hpz_partition_size = _read(f"{_ZERO}.zero_hpz_partition_size", int)
    zero_quantized_weights = _read(f"{_ZERO}.zero_quantized_weights", bool)
    zero_quantized_nontrainable_weights = _read(f"{_ZERO}.zero_quantized_nontrainable_weights", bool)
    zero_quantized_gradients = _read(f"{_ZERO}.zero_quantized_gradients", bool)
    zeropp_loco_param = _fixed(None, _GONE)
    zero_log_trace_cache_warnings = _read(f"{_ZERO}.log_trace_cache_warnings", bool)
    zero_save_muon_momentum_buffer_in_memory = _read(f"{_ZERO}.save_muon_momentum_buffer_in_memory", bool)
    mics_shard_size = _fixed(-1, _GONE)
    is_first_weights_partition_group = _fixed(True, "there is one group of weight shards")
    aio_config = _section("aio")
    graph_harvesting = _read("graph_harvesting", bool)

    # parallelism and compilation
    tensor_parallel_config = _optional("tensor_parallel", Section)
    autotp_size = _read("tensor_parallel.autotp_size", int)
    is_deepcompile_enabled = _fixed(False, _PASSES)
    is_deepcompile_active = _fixed(False, _PASSES)
    compile_zero_optimization_stage = _fixed(False, _PASSES)
    compile_autosp = _fixed(False, _PASSES)
    compile_autotp = _fixed(False, _PASSES)
    uses_parallelization_pass_only = _fixed(False, _PASSES)

    # checkpoints
    checkpoint_tag_validation_enabled = _from(
        lambda config: config.checkpoint.tag_validation != "IGNORE", "Not IGNORE."
    )
    checkpoint_tag_validation_fail = _from(lambda config: config.checkpoint.tag_validation == "FAIL", "FAIL is set.")
    checkpoint_serialization_enabled = _read("checkpoint.checkpoint_serialization", bool)
    checkpoint_writer_enabled = _from(lambda config: config.checkpoint.writer is not None, "A writer block is given.")

    # profiling and tuning
    flops_profiler_enabled = _read("flops_profiler.enabled", bool)
    flops_profiler_recompute_fwd_factor = _read("flops_profiler.recompute_fwd_factor", float)
    flops_profiler_profile_step = _read("flops_profiler.profile_step", int)
    flops_profiler_module_depth = _read("flops_profiler.module_depth", int)
    flops_profiler_top_modules = _read("flops_profiler.top_modules", int)
    flops_profiler_detailed = _read("flops_profiler.detailed", bool)
    flops_profiler_output_file = _optional("flops_profiler.output_file", str)
    autotuning_enabled = _fixed(False, _LATER)
    autotuning_start_profile_step = _read("autotuning.start_profile_step", int)
    autotuning_end_profile_step = _read("autotuning.end_profile_step", int)
    autotuning_metric = _read("autotuning.metric", str)
    autotuning_metric_path = _optional("autotuning.metric_path", str)
    autotuning_model_info_path = _optional("autotuning.model_info_path", str)
    autotuning_profile_model_info = _fixed(False, _LATER)

    # data efficiency and what upstream removed
    data_efficiency_enabled = _fixed(False, _LATER)
    data_efficiency_config = _section("data_efficiency")
    data_sampling_enabled = _fixed(False, _LATER)
    data_sampling_config = _section("data_efficiency.data_sampling")
    curriculum_learning_enabled = _fixed(False, _LATER)
    curriculum_learning_config = _section("data_efficiency.data_sampling.curriculum_learning")
    random_ltd_enabled = _fixed(False, _LATER)
    random_ltd_config = _section("data_efficiency.data_routing.random_ltd")
    curriculum_enabled_legacy = _read("curriculum_learning.enabled", bool)
    curriculum_params_legacy = _section("curriculum_learning")
    pld_enabled = _fixed(False, _GONE)
    pld_params = _section("progressive_layer_drop")
    pld_theta = _read("progressive_layer_drop.theta", float)
    pld_gamma = _read("progressive_layer_drop.gamma", float)
    eigenvalue_enabled = _fixed(False, _GONE)
    eigenvalue_verbose = _read("eigenvalue.verbose", bool)
    eigenvalue_max_iter = _read("eigenvalue.max_iter", int)
    eigenvalue_tol = _read("eigenvalue.tol", float)
    eigenvalue_stability = _read("eigenvalue.stability", float)
    eigenvalue_gas_boundary_resolution = _read("eigenvalue.gas_boundary_resolution", int)
    eigenvalue_layer_name = _read("eigenvalue.layer_name", str)
    eigenvalue_layer_num = _read("eigenvalue.layer_num", int)
    quantize_training = _fixed(False, _GONE)
    elasticity_enabled = _fixed(False, _GONE)
    is_elastic_model_parallel_supported = _fixed(False, _GONE)


def _name_them(methods: Mapping[str, Any]) -> None:
    """Give each method its own name, for help() and tracebacks."""
    for name, method in methods.items():
        if callable(method) and not name.startswith("__"):
            method.__name__, method.__qualname__ = name, f"ConfigGetters.{name}"


_name_them(vars(ConfigGetters))
