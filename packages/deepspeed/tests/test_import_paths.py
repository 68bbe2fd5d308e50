"""Every import path of upstream that this release serves, and a sentence for those that it does not.

The table is upstream's: what clients import, and what its documentation names. A path that starts to work moves from
`deepspeed._absent` to `PATHS`.
"""

from __future__ import annotations

import importlib
import re

import pytest

import deepspeed
from deepspeed._absent import MODULES, NAMES

PATHS = {
    "deepspeed": (
        "ADAM_OPTIMIZER DeepSpeedConfig DeepSpeedConfigError DeepSpeedDataLoader DeepSpeedEngine "
        "DeepSpeedInferenceConfig DeepSpeedOptimizer DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable "
        "DeepSpeedTransformerConfig DeepSpeedTransformerLayer HAS_TRITON InferenceEngine LAMB_OPTIMIZER "
        "MUON_OPTIMIZER OnDevice PipelineEngine PipelineModule TORCH_DISTRIBUTED_DEFAULT_PORT ZeROOptimizer "
        "__git_branch__ __git_hash__ __version__ __version_major__ __version_minor__ __version_patch__ "
        "add_config_arguments add_tuning_arguments checkpointing comm default_inference_config dist "
        "get_accelerator git_version_info inference init_distributed init_inference initialize "
        "is_compile_supported log_dist logger module_inject ops replace_transformer_layer "
        "revert_transformer_layer set_autotp_mode set_optimizer_flags tp_model_init utils zero"
    ),
    "deepspeed.git_version_info": "compatible_ops git_branch git_hash installed_ops torch_info version",
    "deepspeed.comm": (
        "P2POp ReduceOp all_gather all_gather_coalesced all_gather_into_tensor all_gather_object all_reduce "
        "all_reduce_coalesced all_to_all all_to_all_single allgather_fn barrier batch_isend_irecv broadcast "
        "broadcast_object_list configure destroy_process_group gather get_all_ranks_from_group "
        "get_comm_operation_count get_global_rank get_local_rank get_logged_comm_ops get_rank get_world_group "
        "get_world_size has_all_gather_into_tensor has_all_reduce_coalesced has_coalescing_manager "
        "has_comm_data has_reduce_scatter_tensor inference_all_reduce init_distributed initialize_mesh_device "
        "irecv is_available is_initialized isend log_summary monitored_barrier new_group recv reduce "
        "reduce_scatter reduce_scatter_fn reduce_scatter_tensor reset_log scatter send"
    ),
    "deepspeed.comm.comm": "all_reduce configure get_rank get_world_size init_distributed is_initialized log_summary",
    "deepspeed.zero": (
        "DeepSpeedZeRoOffload GatheredParameters Init TiledLinear TiledLinearReturnBias ZeroParamStatus "
        "ZeroParamType register_external_parameter unwrap_model_for_generation"
    ),
    "deepspeed.runtime.zero.partition_parameters": (
        "GatheredParameters Init ZeroParamStatus _orig_torch_arange get_accelerator "
        "unregister_external_parameter zero_wrapper_for_fp_tensor_constructor"
    ),
    "deepspeed.runtime.zero.stage3": (
        "DeepSpeedZeroOptimizer_Stage3 estimate_zero3_model_states_mem_needs_all_cold "
        "estimate_zero3_model_states_mem_needs_all_live"
    ),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer estimate_zero2_model_states_mem_needs_all_cold "
        "estimate_zero2_model_states_mem_needs_all_live"
    ),
    "deepspeed.runtime.zero.config": "DeepSpeedZeroConfig ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config": (
        "DeepSpeedZeroOffloadOptimizerConfig DeepSpeedZeroOffloadParamConfig OffloadDeviceEnum OffloadStateTypeEnum"
    ),
    "deepspeed.runtime.zero.utils": "ZeRORuntimeException is_zero_param",
    "deepspeed.runtime.zero.tiling": "TiledLinear TiledLinearReturnBias",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
    "deepspeed.runtime.config": (
        "ADAMW_OPTIMIZER ADAM_OPTIMIZER DEEPSPEED_OPTIMIZERS DeepSpeedConfig DeepSpeedConfigError "
        "DeepSpeedConfigWriter LAMB_OPTIMIZER"
    ),
    "deepspeed.runtime.config_utils": "DeepSpeedConfigModel get_scalar_param",
    "deepspeed.runtime.base_optimizer": "DeepSpeedOptimizer ZeROOptimizer",
    "deepspeed.runtime.dataloader": "DeepSpeedDataLoader RepeatingLoader",
    "deepspeed.runtime.data_pipeline.curriculum_scheduler": "CurriculumScheduler",
    "deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset": (
        "MMapIndexedDataset MMapIndexedDatasetBuilder data_file_path index_file_path make_builder make_dataset"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": "batch_by_seqlens scale_lr",
    "deepspeed.runtime.lr_schedules": (
        "LRRangeTest OneCycle VALID_LR_SCHEDULES WarmupCosineLR WarmupDecayLR WarmupLR add_tuning_arguments"
    ),
    "deepspeed.runtime.fp16.loss_scaler": (
        "CONSECUTIVE_HYSTERESIS CreateLossScaler DELAYED_SHIFT DynamicLossScaler INITIAL_LOSS_SCALE "
        "LossScaleConfig LossScaler MIN_LOSS_SCALE SCALE_WINDOW"
    ),
    "deepspeed.runtime.utils": (
        "CheckOverflow call_to_str clip_grad_norm_ get_global_norm memory_status move_to_device "
        "partition_balanced partition_uniform required_torch_version see_memory_usage set_random_seed PartitionedTensor"
    ),
    "deepspeed.runtime.activation_checkpointing.checkpointing": (
        "CheckpointFunction checkpoint configure get_cuda_rng_tracker is_configured "
        "model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed non_reentrant_checkpoint reset "
        "set_num_layers"
    ),
    "deepspeed.runtime.pipe.engine": "PipelineEngine",
    "deepspeed.runtime.pipe.module": "LayerSpec PipelineModule TiedLayerSpec",
    "deepspeed.runtime.pipe.schedule": (
        "DataParallelSchedule ForwardPass InferenceSchedule PipeSchedule TrainSchedule"
    ),
    "deepspeed.runtime.pipe.topology": (
        "PipeDataParallelTopology PipeModelDataParallelTopology PipelineParallelGrid ProcessTopology"
    ),
    "deepspeed.runtime.compiler": "disable is_compile_supported is_compiling",
    "deepspeed.linear": "Init LoRAConfig OptimizedLinear QuantizationConfig init_lora",
    "deepspeed.linear.optimized_linear": "LoRAOptimizedLinear OptimizedLinear QuantizedLinear QuantizedParameter",
    "deepspeed.moe.layer": "MoE",
    "deepspeed.moe.sharded_moe": "MOELayer TopKGate _AllToAll top1gating top2gating topkgating",
    "deepspeed.moe.experts": "Experts",
    "deepspeed.moe.mappings": "drop_tokens gather_tokens",
    "deepspeed.moe.utils": (
        "configure_moe_param_groups has_moe_layers is_moe_param is_moe_param_group "
        "split_params_into_different_moe_groups_for_optimizer"
    ),
    "deepspeed.pipe": "LayerSpec PipelineModule ProcessTopology TiedLayerSpec",
    "deepspeed.utils": (
        "OnDevice RepeatingLoader get_caller_func get_z3_leaf_modules groups instrument_w_nvtx log_dist "
        "log_dist_once logger print_json_dist safe_get_full_fp32_param safe_get_full_grad "
        "safe_get_full_optimizer_state safe_get_local_fp32_param safe_get_local_grad "
        "safe_get_local_optimizer_state safe_set_full_fp32_param safe_set_full_grad "
        "safe_set_full_optimizer_state safe_set_local_fp32_param safe_set_local_grad "
        "safe_set_local_optimizer_state safe_update_full_grad_vectorized set_log_level_from_string "
        "set_z3_leaf_module set_z3_leaf_modules tensor_fragment unset_z3_leaf_modules z3_leaf_module "
        "z3_leaf_parameter"
    ),
    "deepspeed.utils.logging": "log_dist logger print_json_dist set_log_level_from_string",
    "deepspeed.utils.timer": "NoopTimer SynchronizedWallClockTimer ThroughputTimer",
    "deepspeed.utils.groups": (
        "_create_expert_and_data_parallel _create_expert_data_and_model_parallel _get_expert_parallel_group "
        "_get_expert_data_parallel_group _get_expert_parallel_world_size _get_max_expert_size initialize "
        "_get_data_parallel_group _get_data_parallel_rank _get_data_parallel_world_size "
        "_get_sequence_parallel_group _get_sequence_parallel_rank _get_sequence_parallel_world_size "
        "get_data_parallel_group get_model_parallel_group get_tensor_model_parallel_group"
    ),
    "deepspeed.utils.zero_to_fp32": (
        "convert_zero_checkpoint_to_fp32_state_dict get_fp32_state_dict_from_zero_checkpoint "
        "get_model_state_file get_optim_files load_state_dict_from_zero_checkpoint"
    ),
    "deepspeed.utils.tensor_fragment": "safe_get_full_fp32_param",
    "deepspeed.utils.numa": "get_numactl_cmd",
    "deepspeed.utils.nvtx": "instrument_w_nvtx",
    "deepspeed.utils.init_on_device": "OnDevice",
    "deepspeed.accelerator": ("DeepSpeedAccelerator get_accelerator is_current_accelerator_supported set_accelerator"),
    "deepspeed.accelerator.real_accelerator": "get_accelerator set_accelerator",
    "deepspeed.ops": (
        "DeepSpeedTransformerConfig DeepSpeedTransformerLayer __compatible_ops__ adagrad adam lamb lion transformer"
    ),
    "deepspeed.ops.adam": "DeepSpeedCPUAdam FusedAdam",
    "deepspeed.ops.adam.cpu_adam": "DeepSpeedCPUAdam",
    "deepspeed.ops.adam.fused_adam": "FusedAdam",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.lion": "DeepSpeedCPULion FusedLion",
    "deepspeed.ops.lion.cpu_lion": "DeepSpeedCPULion",
    "deepspeed.ops.lion.fused_lion": "FusedLion",
    "deepspeed.ops.lamb": "FusedLamb",
    "deepspeed.ops.transformer": "DeepSpeedTransformerConfig DeepSpeedTransformerLayer",
    "deepspeed.checkpoint": (
        "CAT_DIM DS_VERSION FP32_FLAT_GROUPS MODEL_FILE_PREFIX OPTIMIZER_STATE_DICT PARAM_SHAPES "
        "UNIVERSAL_CHECKPOINT_INFO ZERO_STAGE get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank "
        "get_zero_ckpt_name_for_rank"
    ),
    "deepspeed.checkpoint.constants": "ZERO_FILE_PREFIX UNIVERSAL_CHECKPOINT_VERSION_VALUE VOCAB_TENSOR",
    "deepspeed.checkpoint.utils": "clone_tensors_for_torch_save get_zero_ckpt_name_for_rank",
    "deepspeed.launcher.runner": (
        "DEEPSPEED_ENVIRONMENT_NAME encode_world_info fetch_hostfile main parse_args "
        "parse_inclusion_exclusion parse_resource_filter"
    ),
    "deepspeed.launcher.launch": "main",
    "deepspeed.monitor": "MonitorMaster",
    "deepspeed.monitor.monitor": "MonitorMaster",
    "deepspeed.monitor.config": "CSVConfig DeepSpeedMonitorConfig TensorBoardConfig get_monitor_config",
    "deepspeed.profiling.flops_profiler": "FlopsProfiler get_model_profile",
    "deepspeed.profiling.flops_profiler.profiler": (
        "FlopsProfiler duration_to_string flops_to_string get_model_profile macs_to_string number_to_string "
        "params_to_string"
    ),
    "deepspeed.env_report": "cli_main main",
    "deepspeed.inference.engine": "InferenceEngine",
    "deepspeed.inference.config": "DeepSpeedInferenceConfig",
    "deepspeed.module_inject": "replace_transformer_layer revert_transformer_layer",
    "deepspeed.sequence.layer": "DistributedAttention _SeqAllToAll apply_rotary_pos_emb single_all_to_all",
    "deepspeed.sequence.cross_entropy": "vocab_sequence_parallel_cross_entropy",
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": (
        "_release_sequence_parallel_groups get_model_parallel_group get_model_parallel_rank "
        "get_model_parallel_world_size get_sequence_data_parallel_group get_sequence_data_parallel_rank "
        "get_sequence_data_parallel_world_size get_sequence_parallel_group get_sequence_parallel_rank "
        "get_sequence_parallel_world_size initialize_sequence_parallel"
    ),
    "deepspeed.runtime.sequence_parallel.ulysses_sp": (
        "SequenceTiledCompute TiledFusedLogitsLoss TiledMLP UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter "
        "sequence_tiled_compute"
    ),
    "deepspeed.constants": "TORCH_DISTRIBUTED_DEFAULT_PORT default_pg_timeout",
}
"""Module -> names, separated by spaces."""

ABSENT = [
    "accelerator.npu_accelerator autotuning.autotuner checkpoint.deepspeed_checkpoint checkpoint.ds_to_universal",
    "comm.torch comm.utils compile.passes compression.compress datastates domino elasticity.elasticity",
    "inference.v2.engine_v2 io model_implementations.diffusers module_inject.auto_ep",
    "module_inject.containers.llama module_inject.layers module_inject.policy",
    "nebula.config nvme ops.aio ops.fp_quantizer ops.op_builder.builder ops.quantizer ops.sparse_attention",
    "ops.transformer.inference.config runtime.bf16_optimizer runtime.checkpoint_engine.checkpoint_engine",
    "runtime.constants runtime.data_pipeline.data_routing.basic_layer runtime.fp16.onebit.adam runtime.quantize",
    "runtime.sparse_tensor runtime.superoffload runtime.swap_tensor.aio_config",
    "runtime.zenflow.engine runtime.zero.mics runtime.zero.offload_states utils.debug utils.torch",
]
"""Module paths of upstream that are not there."""


def _names() -> list[tuple[str, str]]:
    return [(f"deepspeed.{module}".rstrip("."), name) for module, names in NAMES.items() for name in names]


SAME = [
    ("deepspeed.DeepSpeedEngine", "deepspeed.runtime.engine.DeepSpeedEngine"),
    ("deepspeed.PipelineEngine", "deepspeed.runtime.pipe.engine.PipelineEngine"),
    ("deepspeed.PipelineModule", "deepspeed.runtime.pipe.module.PipelineModule"),
    ("deepspeed.DeepSpeedOptimizer", "deepspeed.runtime.base_optimizer.DeepSpeedOptimizer"),
    ("deepspeed.DeepSpeedDataLoader", "deepspeed.runtime.dataloader.DeepSpeedDataLoader"),
    ("deepspeed.DeepSpeedConfig", "deepspeed.runtime.config.DeepSpeedConfig"),
    ("deepspeed.InferenceEngine", "deepspeed.inference.engine.InferenceEngine"),
    ("deepspeed.logger", "deepspeed.utils.logging.logger"),
    ("deepspeed.zero.Init", "deepspeed.runtime.zero.partition_parameters.Init"),
    ("deepspeed.zero.TiledLinear", "deepspeed.runtime.zero.tiling.TiledLinear"),
    ("deepspeed.utils.OnDevice", "deepspeed.OnDevice"),
    ("deepspeed.checkpointing", "deepspeed.runtime.activation_checkpointing.checkpointing"),
    ("deepspeed.ops.adam.DeepSpeedCPUAdam", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam"),
    ("deepspeed.add_tuning_arguments", "deepspeed.runtime.lr_schedules.add_tuning_arguments"),
    ("deepspeed.accelerator.get_accelerator", "deepspeed.accelerator.real_accelerator.get_accelerator"),
]


@pytest.mark.parametrize("module", PATHS)
def test_every_name_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in PATHS[module].split() if not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize("path", " ".join(ABSENT).split())
def test_a_module_that_is_missing_says_what_to_do(path: str) -> None:
    package, _, name = f"deepspeed.{path}".rpartition(".")
    for statement in (f"import {package}.{name}", f"from {package} import {name}", f"from {package}.{name} import X"):
        with pytest.raises(ModuleNotFoundError, match=rf"no module or name '{package}.*': \w.{{15}}"):
            exec(statement)  # what a script says
    head = path.partition(".")[0]
    if head in MODULES:
        assert not hasattr(deepspeed, head)


@pytest.mark.parametrize("path", MODULES)
def test_a_module_that_exists_is_not_called_missing(path: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"'deepspeed.{path}'|'deepspeed.{path.rpartition('.')[0]}'"):
        importlib.import_module(f"deepspeed.{path}")


@pytest.mark.parametrize(("module", "name"), _names())
def test_a_name_that_is_missing_says_what_to_do(module: str, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': \w.{{15}}"):
        getattr(importlib.import_module(module), name)
    with pytest.raises(ImportError, match=rf"{name}.*: \w.{{15}}"):
        exec(f"from {module} import {name}")  # what a script says


def test_constants_of_upstream_are_explained_and_misspelt_names_are_not() -> None:
    with pytest.raises(ImportError, match=r"TRAIN_BATCH_SIZE.*plain strings"):
        from deepspeed.runtime.config import TRAIN_BATCH_SIZE  # noqa: F401
    with pytest.raises(ImportError, match=r"cannot import name 'clip_grad_nrm_' from 'deepspeed.runtime.utils'[^:]*$"):
        from deepspeed.runtime.utils import clip_grad_nrm_  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'deepspeed.moee'$"):
        importlib.import_module("deepspeed.moee")


def test_what_the_sentences_recommend_exists() -> None:
    sentences = {*MODULES.values(), *(text for names in NAMES.values() for text in names.values())}
    advised = {path for text in sentences for path in re.findall(r"\b((?:deepspeed|ds_\w+)(?:\.\w+)+)", text)}
    assert len(advised) > 15
    for path in advised:
        assert _at(path) is not None


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_paths_give_one_object(one: str, other: str) -> None:
    assert _at(one) is _at(other)


def _at(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)
