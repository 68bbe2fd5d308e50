"""Names of upstream that this release does not have, each with a sentence that says what replaces it.

Pure data, loaded when such a name is asked for: `MODULES` maps a module path below `deepspeed` to its sentence (the
longest prefix counts), `NAMES` lists names of modules that do exist. `_lazy` raises the sentences: a
ModuleNotFoundError where a module is imported, an AttributeError where an attribute is read, an ImportError where it
is imported by name. A name that is built leaves this table; a test holds the table against the packages.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CONSTANT", "MODULES", "NAMES"]

_EXPERTS = "a Hugging Face model's experts train as they are, sharded by ZeRO like any weights; see docs/moe.md"
_LONG = "use deepspeed.sequence.layer for the attention and deepspeed.sequence.tiled for what is large per token"
_WRAP = "call UlyssesSPAttentionHF.register_with_transformers, or put deepspeed.sequence.layer into the model"
_LOSSES = "vocab_sequence_parallel_cross_entropy and TiledFusedLogitsLoss are there; split vocabularies have no loss"
_TIER = "the nvme tier is not there; on a host without accelerator every state is in memory anyway"
_KERNELS = "there is no C++ build; ds_kernels has the kernels (torch, numba and Triton), each an ordinary import"
_PASSES = "there are no compiler passes of our own; call engine.compile(), which is torch.compile of each block"
_POLICIES = "policies are data: ds_inference.inject lists the families, init_inference applies them"
_TP_LAYERS = "the plan is made from names and shapes, ds_inference.tp has it and the layers"
_FILES = "files are written by ds_zero.checkpoint, in the background and without pickles; see docs/checkpoints.md"
_UNIVERSAL = "every checkpoint loads at any number of ranks; read one with ds_zero.checkpoint.consolidate"
_OPTIMIZERS = "one optimizer wrapper serves every stage and dtype: ds_zero.ZeroOptimizer, here engine.optimizer"
_TUNER = "there is no tuner; `deepspeed plan` says what fits and which key to change"
_REMOVED = "upstream removed it in 0.19.8; it is not planned"
_ROUTING = "random layer-wise token dropping is not there; drop tokens in the model"
_SAMPLING = "give deepspeed_io a data_sampler of your own; curriculum_learning and the schedules are here"
_ACCELERATORS = "CPU and CUDA are served; deepspeed.accelerator.set_accelerator takes an accelerator of your own"
_ROLLOUT = "call engine.generate() of the hybrid engine, or ds_inference.LLM"
_INTERNAL = "an internal part of upstream's engine, which is built differently here"
_DEBUG = "read named_parameters() and the ds_* attributes of a parameter; errors name parameters by themselves"

MODULES: Mapping[str, str] = {
    **dict.fromkeys(
        ("accelerator.hpu_accelerator", "accelerator.klxpu_accelerator", "accelerator.mlu_accelerator"), _ACCELERATORS
    ),
    **dict.fromkeys(
        ("accelerator.mps_accelerator", "accelerator.npu_accelerator", "accelerator.sdaa_accelerator"), _ACCELERATORS
    ),
    **dict.fromkeys(("accelerator.supa_accelerator", "accelerator.xpu_accelerator"), _ACCELERATORS),
    "autotuning": _TUNER,
    "checkpoint.affine": _UNIVERSAL,
    "checkpoint.affine_transfer": _UNIVERSAL,
    "checkpoint.autoep_affine": _EXPERTS,
    "checkpoint.autoep_universal": _EXPERTS,
    "checkpoint.autoep_zero3_metadata": _EXPERTS,
    "checkpoint.deepspeed_checkpoint": _UNIVERSAL,
    "checkpoint.ds_to_universal": "every checkpoint is universal already; load it at another number of ranks",
    "checkpoint.reshape_3d_utils": _UNIVERSAL,
    "checkpoint.reshape_meg_2d": _UNIVERSAL,
    "checkpoint.reshape_utils": _UNIVERSAL,
    "checkpoint.universal_checkpoint": _UNIVERSAL,
    "checkpoint.zero_checkpoint": _UNIVERSAL,
    "comm.backend": "transports are ds_comm's; ds_comm.communicator(group).kind names the one in use",
    "comm.ccl": "transports are ds_comm's; ds_comm.communicator(group).kind names the one in use",
    "comm.config": "the section is deepspeed.config's; deepspeed.comm.configure takes its keys",
    "comm.constants": "the names of backends are plain strings: gloo, nccl, mpi",
    "comm.mori": "transports are ds_comm's; ds_comm.communicator(group).kind names the one in use",
    "comm.pg_utils": "use deepspeed.comm.new_group, or ds_comm",
    "comm.torch": "transports are ds_comm's; call deepspeed.comm's functions, which have torch's signatures",
    "comm.utils": "ds_comm reads the environment of launchers; get_rank and its kin say the rest",
    "compat": _INTERNAL,
    "compile": _PASSES,
    "compression": f"{_REMOVED}; quantise for inference with init_inference(quantization=...)",
    "datastates": _FILES,
    "domino": "upstream removed it; tensor parallelism is tensor_parallel.autotp_size in the config",
    "elasticity": f"{_REMOVED}; a checkpoint loads at any number of ranks, and torchrun restarts jobs",
    "git_version_info_installed": "nothing is built at installation; deepspeed.git_version_info has the version",
    "inference.quantization.quantization_context": "use init_inference(quantization=...)",
    "inference.quantization.utils": "use init_inference(quantization=...) or ds_kernels.quantize_weight",
    "inference.v2": "FastGen's place is taken by ds_inference.LLM and the command ds-serve",
    "io": _FILES,
    "launcher.constants": "the names of launchers are plain strings: pdsh, openmpi, mvapich, mpich, impi, slurm",
    "launcher.multinode_runner": "deepspeed.launcher.multinode builds the commands; run `deepspeed --launcher NAME`",
    "model_implementations": _POLICIES,
    **dict.fromkeys(
        (
            "module_inject.auto_ep",
            "module_inject.auto_ep_comm",
            "module_inject.auto_ep_config",
            "module_inject.auto_ep_folding",
            "module_inject.auto_ep_layer",
            "module_inject.auto_ep_preset_adapters",
            "module_inject.auto_ep_presets",
        ),
        _EXPERTS,
    ),
    "module_inject.auto_tp": _TP_LAYERS,
    "module_inject.auto_tp_model_utils": _TP_LAYERS,
    "module_inject.autotp_config": "give the config tensor_parallel.partition_config, the same rules as a dict",
    "module_inject.containers": _POLICIES,
    "module_inject.fusedqkv_utils": _TP_LAYERS,
    "module_inject.inject": _POLICIES,
    "module_inject.layers": _TP_LAYERS,
    "module_inject.load_checkpoint": "init_inference(checkpoint=...) loads them",
    "module_inject.module_quantize": "use init_inference(quantization=...)",
    "module_inject.policy": _POLICIES,
    "module_inject.replace_policy": _POLICIES,
    "module_inject.tp_plan_converter": _TP_LAYERS,
    "module_inject.tp_shard": _TP_LAYERS,
    "module_inject.utils": _POLICIES,
    **dict.fromkeys(
        ("moe.ep_count", "moe.ep_experts", "moe.ep_kernels", "moe.ep_repack", "moe.ep_router", "moe.ep_tp_dispatch"),
        _EXPERTS,
    ),
    "moe.fused_expert_layout": _EXPERTS,
    "monitor.utils": "a monitor whose package is missing says so when it is enabled",
    "nebula": f"{_REMOVED}; saves are asynchronous here anyway",
    "nvme": f"{_TIER}, and there are no tools for it",
    "ops.adam.multi_tensor_apply": _KERNELS,
    "ops.adam.zenflow_cpu_adam": "ZenFlow is not there; use deepspeed.ops.adam.DeepSpeedCPUAdam",
    "ops.adam.zenflow_torch_adam": "ZenFlow is not there; use deepspeed.ops.adam.DeepSpeedCPUAdam",
    "ops.aio": _TIER,
    "ops.compile": _PASSES,
    "ops.deepspeed4science": "use torch.nn.functional.scaled_dot_product_attention with an attn_mask",
    "ops.fp_quantizer": "ds_kernels.quantize_weight quantises weights to 8 and 4 bits",
    "ops.gds": _TIER,
    "ops.lion.multi_tensor_apply": _KERNELS,
    "ops.op_builder": _KERNELS,
    "ops.pin_memory": "torch.Tensor.pin_memory does it",
    "ops.quantizer": "ds_kernels.quantize_weight quantises weights to 8 and 4 bits",
    "ops.random_ltd": _ROUTING,
    "ops.sparse_attention": f"{_REMOVED}; torch.nn.attention.flex_attention takes block masks",
    "ops.transformer.inference": _POLICIES,
    "ops.triton_ops": _KERNELS,
    "profiling.config": "the section flops_profiler is deepspeed.config's",
    "profiling.constants": "the keys of the section flops_profiler are plain strings; see docs/config.md",
    "runtime.activation_checkpointing.config": "call checkpointing.configure with the keys of the section",
    "runtime.bf16_optimizer": _OPTIMIZERS,
    "runtime.checkpoint_engine": f"there is one writer and no interface to choose: {_FILES}",
    "runtime.chunked_cross_entropy": "use TiledFusedLogitsLoss of deepspeed.runtime.sequence_parallel.ulysses_sp",
    "runtime.comm": "gradients are reduced by ds_zero; otherwise use deepspeed.comm.reduce_scatter_tensor",
    "runtime.constants": "the keys of the config are plain strings; see docs/config.md, or deepspeed.config",
    "runtime.data_pipeline.data_routing": _ROUTING,
    "runtime.data_pipeline.data_sampling.data_analyzer": _SAMPLING,
    "runtime.data_pipeline.data_sampling.data_sampler": _SAMPLING,
    "runtime.data_pipeline.data_sampling.utils": _SAMPLING,
    "runtime.data_pipeline.config": "the section data_efficiency is refused; curriculum_learning works",
    "runtime.data_pipeline.constants": "the keys of the config are plain strings; see docs/config.md",
    "runtime.domino": "use tensor_parallel.autotp_size in the config",
    "runtime.fp16.fused_optimizer": _OPTIMIZERS,
    "runtime.fp16.onebit": f"{_REMOVED}; use Adam or Lamb",
    "runtime.fp16.unfused_optimizer": _OPTIMIZERS,
    "runtime.hybrid_engine_graph": "decoding on a CPU is one program per token; CUDA graphs are torch.cuda.graph's",
    "runtime.keep_in_fp32": "cast or keep modules in the script",
    "runtime.model_checkpointing": _FILES,
    "runtime.pipe.dualpipev": 'give the pipeline the schedule "zb_v" (config key pipeline.schedule)',
    "runtime.pipe.p2p": "ds_pipe sends nested tensors itself; otherwise use deepspeed.comm.send and recv",
    "runtime.precision_config": "the sections fp16 and bf16 are deepspeed.config's",
    "runtime.progressive_layer_drop": f"{_REMOVED}; skip layers in the model",
    "runtime.python_gc": "call gc.disable() in the script",
    "runtime.quantize": f"{_REMOVED}; use init_inference(quantization=...)",
    "runtime.rollout": _ROLLOUT,
    "runtime.sparse_tensor": f"{_REMOVED}; gradients of embeddings are reduced as dense tensors",
    "runtime.state_dict_factory": "init_inference(checkpoint=...) reads Megatron's parts",
    "runtime.superoffload": _TIER,
    "runtime.swap_tensor": _TIER,
    "runtime.tensor_parallel": "call deepspeed.tp_model_init, or give the config tensor_parallel.autotp_size",
    "runtime.torch_autocast": "the section torch_autocast works; in the script, use torch.autocast",
    "runtime.weight_quantizer": "use init_inference(quantization=...) or ds_kernels.quantize_weight",
    "runtime.zenflow": _TIER,
    "runtime.zero.contiguous_memory_allocator": _INTERNAL,
    "runtime.zero.leaf_module_config": "the section zero_optimization.leaf_module is deepspeed.config's",
    "runtime.zero.linear": "no linear saves a gathered weight here; torch.nn.Linear is fine",
    "runtime.zero.mics": f"{_REMOVED}; use ZeRO-3",
    "runtime.zero.offload_states": "use engine.offload_states and engine.reload_states",
    "runtime.zero.partitioned_param_coordinator": _INTERNAL,
    "runtime.zero.partitioned_param_profiler": "use deepspeed.profiling.trace_steps, which shows gathers by unit",
    **dict.fromkeys(("sequence.auto_sp", "sequence.autosp_detector", "sequence.autosp_fusion"), _WRAP),
    "sequence.autosp_vit": _WRAP,
    "sequence.fpdt_layer": _LONG,
    "sequence.linear_cross_entropy": _LOSSES,
    "sequence.vocab_parallel_ops": _LOSSES,
    "utils.bwc": _INTERNAL,
    "utils.comms_logging": "use deepspeed.comm.log_summary and ds_comm's ledger",
    "utils.config": "use deepspeed.config",
    "utils.debug": _DEBUG,
    "utils.exceptions": "errors are classes of deepspeed.errors, ds_zero and ds_comm, each also a builtin",
    "utils.mixed_precision_linkage": _INTERNAL,
    "utils.module_utils": "use torch.nn.Module.get_submodule and set_submodule",
    "utils.pin_memory": "torch.Tensor.pin_memory does it",
    "utils.pin_memory_tracker": "torch.Tensor.pin_memory does it",
    "utils.static_cache": "ds_inference.LLM has caches of its own",
    "utils.torch": "deepspeed.runtime.utils.required_torch_version is there; the rest is torch's own",
    "utils.types": "activation functions are named by strings",
    "utils.zero_to_torch": "use deepspeed.utils.zero_to_fp32 and cast, or engine.save_16bit_model",
}
"""Module path below `deepspeed` -> what replaces it. Modules below a path share its sentence."""

CONSTANT = "upstream's constant: keys of the config are plain strings here, see docs/config.md"
"""For ALL_CAPS names of modules that keep a `__getattr__`."""

_COMM = {
    "enable_symm_mem_for_group": "transports are chosen by ds_comm; ds_comm.communicator(group).kind names it",
    "set_backend": "transports are chosen by ds_comm; ds_comm.communicator(group).kind names it",
    "init_deepspeed_backend": "call init_distributed; ds_comm chooses the transport",
    "ProcessGroup": "use torch.distributed.ProcessGroup, which new_group gives",
    "timed_op": "collectives time themselves; call configure(enabled=True) and log_summary()",
    **dict.fromkeys(
        (
            "mpi_discovery",
            "in_aml",
            "in_aws_sm",
            "in_dlts",
            "patch_aml_env_for_torch_nccl_backend",
            "patch_aws_sm_env_for_torch_nccl_backend",
        ),
        "init_distributed reads the environment of launchers itself (torchrun, MPI, SLURM)",
    ),
}
_STAGE = {
    **dict.fromkeys(
        ("IPGBucket", "IPGBucketZ3", "GradPartitionBufferGroup", "get_alignment_padding", "split_half_float_double"),
        _INTERNAL,
    ),
}
_PARTITION = {
    "DeepSpeedTensorOverride": "zero.Init overrides no tensor constructor: modules build their parameters in the dtype "
    "they ask for, and the config's dtype applies when they are sharded",
    **dict.fromkeys(
        ("shutdown_init_context", "restore_init_context"),
        "leave the `with zero.Init()` block instead; initialize and models built outside of it are not touched",
    ),
    **dict.fromkeys(
        (
            "AllGatherHandle",
            "AllGatherCoalescedHandle",
            "AllReduceCoalescedHandle",
            "MultipleAllGatherHandles",
            "NoGatherHandle",
            "NoGatherCoalescedHandle",
        ),
        "gathers are asynchronous by unit; engine.sharded has the units",
    ),
    **dict.fromkeys(
        ("CUDAQuantizer", "QuantizationInfo", "InsertPostInitMethodToModuleSubClasses", "get_allgather_dtype"),
        _INTERNAL,
    ),
}
_NORMS = {
    **dict.fromkeys(
        (
            "get_norm_with_moe_layers",
            "get_norm_with_moe_layers_fast",
            "get_flattened_grad_norm",
            "get_global_norm_of_tensors",
            "get_weight_norm",
            "combine_grad_norm_groups",
            "clip_tensors_by_global_norm",
        ),
        "use get_global_norm and clip_grad_norm_, or engine.get_global_grad_norm()",
    ),
    **dict.fromkeys(("offload_adam_states", "reload_adam_states"), "use engine.offload_states and reload_states"),
    **dict.fromkeys(("has_inf_or_nan", "is_invalid_grad_norm"), "use torch.isfinite(tensor).all()"),
    **dict.fromkeys(
        (
            "align_dense_tensors",
            "all_gather_dp_groups",
            "all_gather_into_tensor_dp_groups",
            "get_inactive_params",
            "get_grad_zeros",
            "mask_nan_or_inf_with_val_inplace",
            "TLinear",
            "DummyOptim",
            "is_model_parallel_parameter",
            "get_only_unique_item",
        ),
        _INTERNAL,
    ),
}
_GROUPS = {
    "_create_model_parallel": "give initialize an mpu that knows its groups",
    "_get_local_all_to_all_group": "quantised gradients (ZeRO++) are not there; gradients are reduced in one way",
    **dict.fromkeys(
        ("set_tensor_model_parallel_world_size", "set_tensor_model_parallel_rank"),
        "give initialize an mpu that knows them, or tensor_parallel.autotp_size",
    ),
    **dict.fromkeys(
        (
            "_create_zero_param_parallel_group",
            "_get_zero_param_intra_parallel_group",
            "_get_zero_param_intra_parallel_group_ranks",
            "_get_zero_param_intra_parallel_group_world_size",
            "_get_zero_param_intra_parallel_rank_in_mygroup",
            "_zero_param_parallel_is_initialized",
        ),
        "secondary partitions (ZeRO++) are not there; parameters are sharded over the data-parallel group",
    ),
}
_FRAGMENTS = dict.fromkeys(
    (
        "tensor_fragment",
        "fragment_address",
        "get_full_hp_param",
        "get_full_hp_grad",
        "get_hp_fragment_mapping",
        "lazy_init_hp_params_optimizer_state",
        "link_hp_params",
        "map_to_flat_opt_states",
        "set_full_hp_param",
        "set_full_hp_grad",
    ),
    "the safe_get_* and safe_set_* functions read and write masters, gradients and states; engine.optimizer.shard_map "
    "says where each lies",
)

NAMES: Mapping[str, Mapping[str, str]] = {
    "": {
        "DualPipeVEngine": 'give the pipeline the schedule "zb_v" (config key pipeline.schedule)',
        "DualPipeVModule": 'use PipelineModule(num_chunks=2, placement="v") with the schedule "zb_v"',
        "resolve_per_head_muon_after_sharding": "Muon sees whole matrices at every stage; there is nothing to resolve",
    },
    "checkpoint": {
        **dict.fromkeys(
            (
                "DeepSpeedCheckpoint",
                "ZeROCheckpoint",
                "enable_universal_checkpoint",
                "get_model_3d_descriptor",
                "merge_state",
                "model_3d_desc",
                "reshape_meg_2d_parallel",
                "SubparamShape",
            ),
            _UNIVERSAL,
        ),
    },
    "comm": _COMM,
    "comm.comm": _COMM,
    "inference": {
        **dict.fromkeys(
            (
                "InferenceEngineV2",
                "RaggedInferenceEngineConfig",
                "build_hf_engine",
                "build_engine_from_ds_checkpoint",
            ),
            "FastGen's place is taken by ds_inference.LLM and the command ds-serve",
        ),
    },
    "module_inject": {
        **dict.fromkeys(("AutoTP", "AutoTPConfig", "AutoTPPresets", "TPLayerSpec", "PartitionType"), _TP_LAYERS),
        **dict.fromkeys(("EmbeddingLayer", "LinearAllreduce", "LinearLayer", "Normalize"), _TP_LAYERS),
        **dict.fromkeys(("DSPolicy", "HFBertLayerPolicy", "ReplaceWithTensorSlicing", "replace_policies"), _POLICIES),
        "GroupQuantizer": "use init_inference(quantization=...) or ds_kernels.quantize_weight",
        "merge_autotp_configs": _TP_LAYERS,
        "quantize_transformer_layer": "use init_inference(quantization=...)",
    },
    "module_inject.replace_module": {
        "GroupQuantizer": "use init_inference(quantization=...) or ds_kernels.quantize_weight",
        "replace_module": _POLICIES,
    },
    "ops.adam": {
        **dict.fromkeys(
            ("ZenFlowCPUAdam", "ZenFlowSelectiveAdamW", "ZenFlowSelectiveAdamW_stage3"),
            "ZenFlow is not there; use deepspeed.ops.adam.DeepSpeedCPUAdam",
        ),
    },
    "runtime.compiler": {
        **dict.fromkeys(("enable", "compile", "compiled_autograd", "lazy_disable", "dummy_decorator"), _PASSES),
    },
    "runtime.config_utils": {
        "DeepSpeedConfigObject": "every section is a DeepSpeedConfigModel",
        **dict.fromkeys(("get_list_param", "get_dict_param"), "use dict.get, or get_scalar_param"),
    },
    "runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": {
        **dict.fromkeys(
            (
                "VariableBatchSizeLR",
                "dataloader_for_variable_batch_size",
                "get_dataloader_and_lr_scheduler_for_variable_batch_size",
                "get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed",
                "lr_scheduler_for_variable_batch_size",
            ),
            "batch_by_seqlens cuts the batches and scale_lr the rates; give a torch DataLoader the former as its "
            "batch_sampler",
        ),
    },
    "runtime.fp16.loss_scaler": {
        **dict.fromkeys(
            ("LossScaleProfile", "LossScaleProfileDefaults", "LOSS_SCALE_PROFILE_DEFAULTS"),
            "one scaler serves every optimizer: the keys of the section fp16 say all of it",
        ),
    },
    "runtime.pipe.schedule": {
        **dict.fromkeys(("DualPipeVSchedule", "CommitP2P"), 'ds_pipe has the schedule "zb_v", which is of that kind'),
    },
    "runtime.utils": _NORMS,
    "runtime.zero": {
        "DeepSpeedTensorOverride": _PARTITION["DeepSpeedTensorOverride"],
        "MiCS_Init": f"{_REMOVED}; use zero.Init",
    },
    "runtime.zero.parameter_offload": {
        **dict.fromkeys(("ZeROOrderedDict", "ensure_zero_ordered_dict"), "external parameters are found by plan"),
    },
    "runtime.zero.partition_parameters": _PARTITION,
    "runtime.zero.stage3": _STAGE,
    "runtime.zero.stage_1_and_2": _STAGE,
    "runtime.sequence_parallel.ulysses_sp": {
        "AutogradComputeMLP": _INTERNAL,
        **dict.fromkeys(("TiledLoss", "UlyssesSPFwdLossBwdWithLogits"), "use TiledFusedLogitsLoss"),
    },
    "sequence.cross_entropy": {
        **dict.fromkeys(
            (
                "VocabParallelCausalLMLoss",
                "VocabParallelCrossEntropyLoss",
                "configure_vocab_parallel_loss",
                "validate_vocab_parallel_loss",
                "vocab_parallel_cross_entropy",
            ),
            _LOSSES,
        ),
    },
    "sequence.layer": {
        **dict.fromkeys(
            ("post_all2all", "pre_all2all_fun", "register_all_to_all_group", "uneven_heads_all2all"),
            "use single_all_to_all, which takes uneven heads too",
        ),
    },
    "utils": {**_GROUPS, **{name: text for name, text in _FRAGMENTS.items() if name != "tensor_fragment"}},
    "utils.groups": _GROUPS,
    "utils.logging": {
        "LoggerFactory": "use logging.getLogger; the logger of this package is deepspeed.utils.logger",
        "print_dist": "use deepspeed.utils.log_dist",
    },
    "utils.tensor_fragment": _FRAGMENTS,
    "utils.zero_to_fp32": {
        "convert_zero_checkpoint_to_state_dict": "use convert_zero_checkpoint_to_fp32_state_dict and cast",
        **dict.fromkeys(
            ("get_checkpoint_files", "get_model_state_files", "parse_model_states", "parse_optim_states"),
            "read a checkpoint with get_fp32_state_dict_from_zero_checkpoint",
        ),
    },
}
"""Module path below `deepspeed` ("" for the package) -> name -> what replaces it."""
