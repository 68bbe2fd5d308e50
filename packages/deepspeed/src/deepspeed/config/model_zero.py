"""Sections about where model states live: `zero_optimization` with its blocks, and `aio`.

Vocabulary: stage 0-3 = nothing / optimizer state / + gradients / + parameters sharded over the data-parallel ranks;
numbers of "elements" count tensor elements, not bytes. This is the JSON section; the engine translates it for ds_zero.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from deepspeed.config.base import Count, Fraction, FreeForm, Integer, PathText, Positive, Section

__all__ = ["Aio", "LeafModule", "OffloadOptimizer", "OffloadParam", "ZenFlow", "ZeroSection"]

Device = Literal["none", "cpu", "nvme"]


class OffloadParam(Section):
    """Where stage 3 keeps the parameter shards."""

    device: Device = "none"
    """none keeps them on the accelerator."""
    nvme_path: PathText | None = None
    """Folder for the nvme device."""
    buffer_count: Count = 5
    """Number of staging buffers for nvme."""
    buffer_size: Count = 100_000_000
    """Elements of one staging buffer."""
    max_in_cpu: Count = 1_000_000_000
    """Parameter elements kept in host memory when nvme is on."""
    pin_memory: bool = True
    """Use page-locked host memory."""


class OffloadOptimizer(Section):
    """Where stages 1-3 keep optimizer state and run the optimizer."""

    device: Device = "none"
    """none keeps it on the accelerator."""
    nvme_path: PathText | None = None
    """Folder for the nvme device."""
    buffer_count: Count = 4
    """Number of staging buffers for nvme."""
    pin_memory: bool = True
    """Use page-locked host memory."""
    pipeline_read: bool = False
    """Overlap reading the next tile with the step of this one (nvme)."""
    pipeline_write: bool = False
    """Overlap writing the last tile with the step of this one (nvme)."""
    fast_init: bool = False
    """Faster start with nvme."""
    ratio: Fraction = 1.0
    """Share of the optimizer state that is offloaded; less than 1 needs stage 3."""
    super_offload: bool = False
    """Upstream's offload mode for tightly coupled CPU-GPU hosts."""
    cpuadam_cores_perc: Fraction = 0.8
    """Share of the cores given to the optimizer by super_offload."""

    @property
    def pipeline(self) -> bool:
        """Whether reading or writing is overlapped."""
        return self.pipeline_read or self.pipeline_write


class ZenFlow(Section):
    """Upstream's stall-free offload; recognised to be refused."""

    topk_ratio: Fraction = 0.1
    """Share of gradients updated at once on the accelerator."""
    select_strategy: Literal["auto", "step", "epoch"] = "auto"
    """When the important gradients are chosen again."""
    select_interval: Integer | None = None
    """Steps or epochs between choices; none means auto."""
    update_interval: Integer | None = None
    """Steps between updates of the rest; none means auto."""
    overlap_step: bool = False
    """Overlap the CPU optimizer with the next steps."""
    offload: bool = False
    """Keep the chosen states on the CPU too."""
    auto_ratio: Fraction = 0.99
    """Threshold of the automatic intervals."""
    full_warm_up_rounds: Count = 0
    """Full updates before the mode starts."""
    pt_reserved_cores_perc: Fraction = 0.5
    """Share of cores left to PyTorch."""
    steps_per_epoch: Count | None = None
    """Set by upstream itself."""


_LEAF_CLASSES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


class LeafModule(Section):
    """Modules that stage 3 gathers as one unit."""

    classes: tuple[str, ...] = _LEAF_CLASSES
    """Class names, plain or fully qualified."""
    names: tuple[str, ...] = ()
    """Full module names."""
    name_suffixes: tuple[str, ...] = ()
    """Endings of module names."""

    @field_validator("classes", "names", "name_suffixes", mode="before")
    @classmethod
    def _as_unique_tuple(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return (
            tuple(dict.fromkeys(value))
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            else value
        )


class ZeroSection(Section):
    """ZeRO: which model states are sharded over the data-parallel ranks, and how they travel."""

    stage: Integer = 0
    """0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they are made."""
    reduce_scatter: bool = True
    """Reduce-scatter gradients instead of all-reducing them."""
    reduce_bucket_size: Positive = 500_000_000
    """Elements per gradient reduction at most."""
    use_multi_rank_bucket_allreduce: bool = True
    """Merge the buckets of several ranks in one all-reduce."""
    allgather_partitions: bool = True
    """All-gather updated parameters instead of broadcasting each."""
    allgather_bucket_size: Positive = 500_000_000
    """Elements per all-gather of updated parameters at most."""
    overlap_comm: bool | None = None
    """Overlap gradient reduction with backward; none means yes at stage 3 and no below."""
    load_from_fp32_weights: bool = True
    """Restore the master weights from the checkpoint's fp32 copy; false re-derives them from the 16-bit weights."""
    elastic_checkpoint: bool = False
    """Upstream's older checkpoint form that could change the number of ranks."""
    offload_param: OffloadParam | None = None
    """Placement of parameter shards (stage 3)."""
    offload_optimizer: OffloadOptimizer | None = None
    """Placement of optimizer state (stages 1-3)."""
    zenflow: ZenFlow | None = None
    """Stall-free offload."""
    sub_group_size: Positive = 1_000_000_000
    """Elements per tile of the optimizer's pass (stage 3)."""
    stage3_prefetch_bucket_size: Count = 50_000_000
    """Elements gathered ahead of use at most."""
    stage3_param_persistence_threshold: Count = 100_000
    """Parameters of at most this many elements stay gathered."""
    stage3_model_persistence_threshold: Count = sys.maxsize
    """Cap on the elements that stay gathered in all."""
    stage3_max_live_parameters: Count = 1_000_000_000
    """Cap on the elements gathered at one time."""
    stage3_max_reuse_distance: Count = 1_000_000_000
    """Keep a parameter gathered if it is used again within this many elements."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Let save_16bit_model gather the whole model at stage 3."""
    stage3_module_granularity_threshold: Count = 0
    """Fetch modules with fewer elements than this together with their parent."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Fetch parameters by all-reduce instead of all-gather."""
    stage3_allgather_sequential: bool = False
    """Gather parameter by parameter, without prefetch."""
    ignore_unused_parameters: bool = True
    """False makes a parameter without gradient an error at stage 2."""
    legacy_stage1: bool = False
    """Upstream's removed first implementation of stage 1."""
    round_robin_gradients: bool = False
    """Spread the copies of offloaded gradients over the ranks."""
    zero_hpz_partition_size: Positive = 1
    """ZeRO++: ranks that hold a secondary copy of the parameters together."""
    zero_quantized_weights: bool = False
    """ZeRO++: gather weights as int8."""
    zero_quantized_nontrainable_weights: bool = False
    """ZeRO++: store frozen weights quantised."""
    zero_quantized_gradients: bool = False
    """ZeRO++: reduce gradients quantised."""
    zeropp_loco_param: FreeForm | None = None
    """ZeRO++: error feedback of quantised gradients."""
    mics_shard_size: Integer = -1
    """MiCS: ranks per shard group."""
    mics_hierarchical_params_gather: bool = False
    """MiCS: gather in two levels."""
    memory_efficient_linear: bool = True
    """Use a linear that does not save the gathered weight."""
    pipeline_loading_checkpoint: bool = False
    """Load checkpoints one local rank after another (stage 3)."""
    override_module_apply: bool = True
    """Gather parameters around Module.apply inside zero.Init."""
    log_trace_cache_warnings: bool = False
    """Warn when the recorded order of modules does not fit."""
    enable_sanity_checks: bool = False
    """Detect writes to gathered parameters that would be lost."""
    save_muon_momentum_buffer_in_memory: bool = False
    """Keep Muon's momentum out of nvme."""
    leaf_module: LeafModule = LeafModule()
    """Modules gathered as one unit."""
    cpu_offload_use_pin_memory: bool | None = None
    """Deprecated: offload_optimizer.pin_memory."""
    compute_grad_norm: bool = True
    """False skips the gradient norm when nothing needs it (stages 1 and 2)."""
    parameter_alignment: bool = False
    """Align parameters to 16 bytes in the flat buffers."""

    @field_validator("stage")
    @classmethod
    def _stage_exists(cls, value: int) -> int:
        if not 0 <= value <= 3:
            raise ValueError("there is no such ZeRO stage; the stages are 0, 1, 2 and 3")
        return value

    @model_validator(mode="after")
    def _partial_offload_needs_stage3(self) -> ZeroSection:
        if self.offload_optimizer is not None and self.offload_optimizer.ratio < 1 and self.stage != 3:
            raise ValueError(
                f"offload_optimizer.ratio {self.offload_optimizer.ratio} (less than 1) needs stage 3, but stage "
                f"is {self.stage}"
            )
        return self


class Aio(Section):
    """Asynchronous file I/O of the nvme tier."""

    block_size: Positive = 1_048_576
    """Bytes per request."""
    queue_depth: Positive = 8
    """Requests in flight."""
    intra_op_parallelism: Positive = 1
    """Threads per operation."""
    single_submit: bool = False
    """Submit requests one by one."""
    overlap_events: bool = True
    """Wait for completions while submitting."""
    use_gds: bool = False
    """GPUDirect Storage."""
    thread_count: Any = Field(default=None)
    """Sent by clients from upstream's documentation; upstream never read it."""
