"""What of each config key this version does: one table, read by `enforce`, by the docs page and by the tests.

    works        the value changes what happens (or is checked against what happens)
    no-op        accepted and ignored, for the stated reason; said once in the log when given
    unsupported  refused while the feature is on, by the name of the key; a disabled block is accepted

Paths are dotted keys; "section.*" covers a section's keys that have no entry of their own. A test walks all keys:
each has an entry, and each that works changes something observable in the resolved config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["ACCEPTED_AND_IGNORED", "SUPPORT", "Support", "support_of"]


@dataclass(frozen=True)
class Support:
    """Status of a key and why."""

    status: Literal["works", "no-op", "unsupported"]
    note: str = ""


def _all(status: Literal["works", "no-op", "unsupported"], note: str, *paths: str) -> dict[str, Support]:
    return dict.fromkeys(paths, Support(status, note))


_GONE = "upstream removed it in 0.19.8; it is not planned"
_ZEROPP = "ZeRO++ is not here yet"
_TIER = "comes with the nvme tier"
_NVME_ONLY = "read by the nvme tier only, which comes later"

SUPPORT: Mapping[str, Support] = MappingProxyType(
    {
        **_all(
            "works",
            "",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "steps_per_print",
        ),
        **_all(
            "works",
            "",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "gradient_clipping",
            "gradient_allreduce_op",
        ),
        **_all("works", "", "dataloader_drop_last", "log_level", "managed_gradient_accumulation"),
        "communication_data_type": Support(
            "works",
            "sums are fp32 whatever travels, so the model dtype or a wider one gives the same bits; a narrower "
            "one is refused",
        ),
        "data_parallel_size": Support("works", "checked against the number of data-parallel ranks"),
        "allgather_size": Support("works", 'read with `"zero_optimization": true` only'),
        **_all(
            "no-op",
            "gradients are summed in fp32, so dividing before or after the sum makes no difference",
            "prescale_gradients",
            "gradient_predivide_factor",
        ),
        "seq_parallel_communication_data_type": Support(
            "no-op", "sums over the ranks of a sequence are fp32 whatever travels, as all sums are"
        ),
        "sequence_parallel_size": Support("works", "neighbouring ranks share a sequence"),
        "disable_allgather": Support("no-op", "upstream parses it and never uses it"),
        "zero_allow_untested_optimizer": Support(
            "no-op", "every torch optimizer that works element by element is allowed"
        ),
        "zero_force_ds_cpu_optimizer": Support("no-op", "every optimizer runs on the CPU"),
        "graph_harvesting": Support(
            "no-op", "upstream's CUDA-graph switch of an optimizer class that does not exist here"
        ),
        "vocabulary_size": Support("no-op", "upstream only warns about it"),
        "sparse_gradients": Support("unsupported", _GONE),
        "use_data_before_expert_parallelism": Support("works"),
        "disable_python_gc": Support("unsupported", "call gc.disable() in the script instead"),
        "optimizer.*": Support(
            "works", "Adam, AdamW, Adagrad, Lamb, Lion, Muon and every elementwise class of torch.optim"
        ),
        "optimizer.legacy_fusion": Support("no-op", "upstream's older fused Lamb wrapper, which does not exist here"),
        "scheduler.*": Support("works"),
        "fp16.*": Support("works"),
        "fp16.fp16_master_weights_and_grads": Support("unsupported", "the master is always fp32 so far"),
        "bf16.*": Support("works"),
        "bf16.immediate_grad_update": Support(
            "no-op", "every micro-batch's gradient enters the fp32 sum when its backward ends"
        ),
        **_all(
            "unsupported",
            "master and optimizer state are always fp32 so far",
            "bf16.bf16_master_weights_and_grads",
            "bf16.bf16_optimizer_states",
        ),
        "amp.*": Support("unsupported", f"{_GONE}; use bf16, fp16 or torch_autocast"),
        "torch_autocast.*": Support("works"),
        "torch_autocast.lower_precision_safe_modules": Support(
            "no-op", "parameters and gradients travel in their own dtype, autocast or not"
        ),
        "data_types.*": Support("works"),
        "data_types.param_dtype": Support("works", "checked against the dtype that fp16/bf16 choose"),
        **_all(
            "unsupported",
            "cast or keep modules in the script instead",
            "data_types.buffer_dtype",
            "data_types.keep_in_fp32_modules",
        ),
        "zero_optimization.*": Support("works"),
        "zero_optimization.stage3_allgather_sequential": Support("works", "switches prefetch off"),
        "zero_optimization.contiguous_gradients": Support(
            "no-op", "gradients are made in one flat buffer per unit anyway"
        ),
        **_all(
            "no-op",
            "there is one way to reduce and to gather, and it moves the fewest bytes",
            "zero_optimization.use_multi_rank_bucket_allreduce",
            "zero_optimization.allgather_partitions",
            "zero_optimization.stage3_use_all_reduce_for_fetch_params",
        ),
        "zero_optimization.elastic_checkpoint": Support("no-op", "every checkpoint loads at any number of ranks"),
        "zero_optimization.stage3_module_granularity_threshold": Support(
            "no-op", "whole blocks are fetched as units anyway"
        ),
        "zero_optimization.round_robin_gradients": Support("no-op", "every rank copies its own shard only"),
        "zero_optimization.memory_efficient_linear": Support(
            "no-op", "no linear saves a gathered weight: parameters are views of the unit's buffer"
        ),
        "zero_optimization.pipeline_loading_checkpoint": Support("no-op", "ranks read only their own ranges, streamed"),
        "zero_optimization.override_module_apply": Support(
            "no-op", "zero.Init always shows whole parameters to Module.apply"
        ),
        "zero_optimization.log_trace_cache_warnings": Support(
            "no-op", "the recorded order is a hint; a miss costs time, never correctness"
        ),
        "zero_optimization.save_muon_momentum_buffer_in_memory": Support("no-op", _NVME_ONLY),
        "zero_optimization.leaf_module": Support(
            "no-op", "whole blocks are units; one that no token reached contributes zeros by plan"
        ),
        "zero_optimization.leaf_module.*": Support(
            "no-op", "whole blocks are units; one that no token reached contributes zeros by plan"
        ),
        "zero_optimization.cpu_offload_use_pin_memory": Support("no-op", "deprecated; upstream only warns about it"),
        "zero_optimization.compute_grad_norm": Support(
            "no-op", "the norm is a by-product of the check for inf and nan"
        ),
        "zero_optimization.parameter_alignment": Support("no-op", "flat buffers are always aligned"),
        "zero_optimization.legacy_stage1": Support("unsupported", "upstream removed it; use stage 1"),
        "zero_optimization.zenflow.*": Support("unsupported", _TIER),
        "zero_optimization.enable_sanity_checks": Support("unsupported", "comes with the debugging tools"),
        **_all(
            "unsupported",
            _ZEROPP,
            "zero_optimization.zero_hpz_partition_size",
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.zero_quantized_nontrainable_weights",
            "zero_optimization.zero_quantized_gradients",
        ),
        **_all(
            "unsupported",
            _GONE,
            "zero_optimization.zeropp_loco_param",
            "zero_optimization.mics_shard_size",
            "zero_optimization.mics_hierarchical_params_gather",
        ),
        **_all(
            "works",
            "none works; cpu is where everything lives on a host without accelerator, and is refused beside one "
            "so far; nvme is refused so far",
            "zero_optimization.offload_param.device",
            "zero_optimization.offload_optimizer.device",
        ),
        "zero_optimization.offload_param.*": Support(
            "no-op", "read when states move between device and host, which comes later"
        ),
        "zero_optimization.offload_optimizer.*": Support(
            "no-op", "read when states move between device and host, which comes later"
        ),
        "zero_optimization.offload_optimizer.nvme_path": Support(
            "works", 'the folder of engine.offload_states(device="nvme")'
        ),
        "zero_optimization.offload_optimizer.super_offload": Support("unsupported", _TIER),
        "aio.*": Support("no-op", _NVME_ONLY),
        "aio.thread_count": Support("no-op", "upstream documents it and never reads it"),
        "activation_checkpointing.*": Support("works"),
        "pipeline.*": Support("works"),
        "pipeline.partition": Support(
            "no-op", "the PipelineModule is built before the config is read; it has partition_method"
        ),
        "pipeline.seed_layers": Support("no-op", "the PipelineModule is built before the config is read; it has it"),
        "pipeline.pipe_partitioned": Support("no-op", "upstream reads it under tensor parallelism only"),
        "pipeline.grad_partitioned": Support("no-op", "upstream reads it under tensor parallelism only"),
        "pipeline.use_reentrant": Support("no-op", "checkpoints are never reentrant; the results are the same"),
        "checkpoint.tag_validation": Support(
            "no-op", "ranks that save under different tags always raise, before anything is written"
        ),
        "checkpoint.use_node_local_storage": Support("unsupported", "save to a folder that all nodes share"),
        "checkpoint.load_universal": Support(
            "no-op", "every checkpoint is universal: it loads at any number of ranks and any stage"
        ),
        "checkpoint.parallel_write.*": Support("no-op", "every rank writes its own shard"),
        "checkpoint.checkpoint_serialization": Support("no-op", "shards are safetensors, never torch's zip files"),
        "checkpoint.writer.*": Support("no-op", "there is one writer: it works in the background"),
        "comms_logger.*": Support("works"),
        "flops_profiler.*": Support("works"),
        "flops_profiler.recompute_fwd_factor": Support(
            "no-op", "a forward that checkpointing runs again is counted when it is"
        ),
        "tensorboard.*": Support("works"),
        "wandb.*": Support("works"),
        "csv_monitor.*": Support("works"),
        "comet.*": Support("works"),
        "timers.*": Support("works"),
        "tensor_parallel.*": Support("works"),
        "tensor_parallel.dtype": Support("works", "checked against the dtype that the config trains in"),
        "tensor_parallel.tensor_parallel.*": Support("works"),
        "tensor_parallel.tensor_parallel.mpu": Support("no-op", "give it to initialize(mpu=...)"),
        "tensor_parallel.tp_overlap_comm": Support("no-op", "overlap never changes results"),
        "tensor_parallel.preset_model": Support("no-op", "the plan is made from names and shapes, for every family"),
        "tensor_parallel.keep_module_on_host": Support("unsupported", "give initialize a model on the CPU or on meta"),
        "tensor_parallel.replace_with_kernel_inject": Support("unsupported", "use the section kernels"),
        "tensor_parallel.vocab_parallel_ce_backend": Support(
            "no-op", "logits are gathered before the loss, which is the model's own"
        ),
        "expert_parallel.*": Support(
            "unsupported", "a model's experts train as they are, sharded by ZeRO like any weights"
        ),
        "compile.*": Support(
            "no-op", "engine.compile() compiles the blocks; ZeRO's hooks gather and reduce around them, without passes"
        ),
        "compile.offload_activation": Support("unsupported", "use activation_checkpointing.cpu_checkpointing"),
        "compile.offload_opt_states": Support("unsupported", "use zero_optimization.offload_optimizer"),
        "compile.offload_parameters": Support("unsupported", "use zero_optimization.offload_param"),
        "compile.passes": Support(
            "no-op",
            "stages, sequence and tensor parallelism have sections of their own; engine.compile() has no passes",
        ),
        "hybrid_engine.*": Support("works"),
        "hybrid_engine.inference_tp_size": Support(
            "unsupported", "every rank generates with the whole gathered model, at its own pace; leave it at 1"
        ),
        "hybrid_engine.pin_parameters": Support("no-op", "there is one kind of memory; weights are never copied to it"),
        "hybrid_engine.tp_gather_partition_size": Support("no-op", "a unit is gathered in one piece"),
        "hybrid_engine.enable_cuda_graph": Support("no-op", "decoding is one program per token, without graphs"),
        "kernels.*": Support("works"),
        "data_efficiency.*": Support("unsupported", "comes with the data-efficiency tools"),
        "curriculum_learning.*": Support("works"),
        "compression_training": Support("unsupported", _GONE),
        "elasticity.*": Support("unsupported", _GONE),
        "autotuning.*": Support("unsupported", "comes with the tuning tools"),
        "eigenvalue.*": Support("unsupported", _GONE),
        "progressive_layer_drop.*": Support("unsupported", _GONE),
        "sparse_attention": Support("unsupported", _GONE),
        "quantize_training.*": Support("unsupported", _GONE),
        "weight_quantization.*": Support("unsupported", "for training; init_inference(quantization=...) quantises"),
        "nebula.*": Support("unsupported", _GONE),
        "datastates_ckpt": Support(
            "unsupported", "needs an engine that only upstream has; saves are asynchronous here anyway"
        ),
    }
)
"""Key path or "section.*" -> status. The longest match counts."""

ACCEPTED_AND_IGNORED: Mapping[str, str] = MappingProxyType(
    {path: s.note for path, s in SUPPORT.items() if s.status == "no-op"}
)
"""The documented no-ops: key path (or "section.*") -> the reason."""


def support_of(path: str) -> Support:
    """The entry for a key: its own, else that of the nearest "section.*". KeyError when the table has a gap."""
    if path in SUPPORT:
        return SUPPORT[path]
    names = path.split(".")
    for length in range(len(names), 0, -1):
        pattern = ".".join([*names[:length], "*"])
        if pattern in SUPPORT:
            return SUPPORT[pattern]
    raise KeyError(f"config key {path} has no entry in the support table")
