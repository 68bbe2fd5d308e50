"""Sections about how a step runs and what is stored: activation checkpointing, checkpoints, and the forms of
parallelism beyond ZeRO.

`pipeline`, `tensor_parallel`, `expert_parallel`, `compile`, `hybrid_engine` and `kernels` are closed like the others,
so that a misspelt key is found even where the feature itself is not there yet (see `support`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from deepspeed.config.base import Count, DtypeName, FreeForm, Integer, Positive, Real, Section

__all__ = [
    "ActivationCheckpointing",
    "Checkpoint",
    "Compile",
    "ExpertParallel",
    "HybridEngine",
    "Pipeline",
    "TensorParallel",
]


class ActivationCheckpointing(Section):
    """Defaults of `deepspeed.checkpointing`."""

    partition_activations: bool = False
    """Shard saved activations over the tensor-parallel ranks."""
    number_checkpoints: Count | None = None
    """Number of checkpoints per pass; needed by contiguous_memory_optimization."""
    contiguous_memory_optimization: bool = False
    """Copy saved activations into one buffer; needs partition_activations."""
    cpu_checkpointing: bool = False
    """Keep saved activations in host memory."""
    profile: bool = False
    """Time the recomputed passes."""
    synchronize_checkpoint_boundary: bool = False
    """Synchronise the device at each checkpoint."""
    policy: Literal["none", "full", "selective", "budget"] | None = None
    """What the model's blocks recompute in backward, without a change of its code; null leaves that to the model."""
    policy_interval: Positive = 1
    """Apply the policy to every so many-th block."""
    policy_budget: Count | None = None
    """Bytes that blocks may keep from forward to backward, per rank and micro-batch; makes the policy "budget"."""


class Pipeline(Section):
    """Training of a `PipelineModule`."""

    schedule: Literal["auto", "1f1b", "gpipe", "interleaved", "zb_h1", "zb_v"] = "auto"
    """Order of forwards and backwards. auto: 1f1b, or for a PipelineModule with several chunks per stage the one that
    fits them, interleaved or zb_v."""
    stages: Literal["auto"] | Positive = "auto"
    """Number of pipeline stages; an error if the PipelineModule has another."""
    partition: str = "best"
    """How layers are split over stages."""
    seed_layers: bool = False
    """Seed each layer by its index."""
    activation_checkpoint_interval: Count = 0
    """Layers per activation checkpoint; 0 for none."""
    pipe_partitioned: bool = True
    """Shard activations sent between stages over the tensor-parallel ranks."""
    grad_partitioned: bool = True
    """Shard gradients sent between stages over the tensor-parallel ranks."""
    use_reentrant: bool = True
    """Kind of activation checkpointing."""


class ParallelWrite(Section):
    """Who writes checkpoint files."""

    pipeline_stage: bool = False
    """Split layer files over the data-parallel ranks of a pipeline stage."""


class CheckpointWriter(Section):
    """Upstream's choice of file writer."""

    type: str = "FAST"
    """MOCK, PYTHON or FAST."""
    decoupled: bool = False
    """Write in a process of its own."""
    io_buffer_size: Positive = 67_108_864
    """Bytes of the write buffer."""
    io_buffer_double: bool = True
    """Use two buffers."""
    show_statistics: bool = False
    """Log the write speed."""
    data_parallel: str | None = None
    """REPLICA, SOCKET or MACHINE."""
    io_multiplier: Positive = 1
    """Writers per rank."""


class Checkpoint(Section):
    """Saving and loading."""

    tag_validation: Literal["IGNORE", "WARN", "FAIL"] = "WARN"
    """What to do when ranks save under different tags."""
    load_universal: bool = False
    """Load upstream's universal layout."""
    use_node_local_storage: bool = False
    """The save folder is local to each node: one rank of every node writes the shared files."""
    parallel_write: ParallelWrite = ParallelWrite()
    """Who writes."""
    checkpoint_serialization: bool = True
    """Use torch's zip format."""
    writer: CheckpointWriter | None = None
    """File writer."""

    @field_validator("tag_validation", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class TensorParallelGroup(Section):
    """Size and group of tensor parallelism."""

    tp_size: Positive = 1
    """Ranks per tensor-parallel group."""
    tp_grain_size: Positive = 1
    """Granularity of splits."""
    mpu: Any = None
    """Object that knows the groups."""
    tp_group: Any = None
    """Process group."""


class TensorParallel(Section):
    """Automatic tensor parallelism in training."""

    autotp_size: Count = 0
    """Ranks per tensor-parallel group; 0 is off."""
    dtype: DtypeName | None = None
    """Dtype of the model."""
    tp_overlap_comm: bool = False
    """Overlap tensor-parallel communication with compute."""
    tensor_parallel: TensorParallelGroup = TensorParallelGroup()
    """Size and group."""
    injection_policy_tuple: Any = None
    """Upstream's layer policy."""
    preset_model: str | None = None
    """Name of a built-in plan."""
    partition_config: FreeForm | None = None
    """A plan of one's own."""
    keep_module_on_host: bool = False
    """Do not move weights to the device."""
    replace_with_kernel_inject: bool = False
    """Swap known layers for fused ones."""
    vocab_parallel_lm_head: Any = None
    """Split the language model head over the vocabulary."""
    vocab_parallel_ce_backend: Literal["torch", "liger"] = "torch"
    """Cross entropy used with it."""


class ExpertParallel(Section):
    """Automatic expert parallelism in training."""

    enabled: bool = False
    """Split experts over ranks."""
    autoep_size: Positive = 1
    """Ranks per expert-parallel group; must divide the number of experts."""
    expert_tensor_parallel_size: Positive = 1
    """Tensor-parallel ranks inside an expert."""
    validate_folding_routing: bool = False
    """Check the routing of folded groups."""
    preset_model: str | None = None
    """Name of a built-in description of the model's experts."""
    moe_layer_pattern: str | None = None
    """Pattern of MoE layer names."""
    expert_pattern: str | None = None
    """Pattern of expert names."""
    router_pattern: str | None = None
    """Pattern of router names."""
    use_grouped_mm: bool = True
    """Use grouped matrix products."""
    disable_triton_grouped_mm: bool = False
    """Avoid the Triton version."""
    route_norm: bool | None = None
    """Normalise the chosen scores."""
    route_scale: Real = 1.0
    """Factor on the scores."""
    score_apply: Literal["auto", "pre", "post"] = "auto"
    """Apply scores before or after the experts."""
    combine_impl: Literal["auto", "weighted_sum", "legacy_bmm"] = "auto"
    """How outputs are combined."""
    score_func: Literal["auto", "softmax", "sigmoid"] = "auto"
    """Function of the router's scores."""
    num_expert_groups: Positive | None = None
    """Groups of experts in group-limited routing."""
    num_limited_groups: Positive | None = None
    """Groups a token may use."""
    top_k: Literal["auto"] | Positive = "auto"
    """Experts per token."""
    load_balance_coeff: Real | None = None
    """Only null."""
    routed_scaling_factor: Literal["auto"] | Real = "auto"
    """Factor on routed outputs."""
    expert_w1: str | None = None
    """Name of the first expert weight."""
    expert_w2: str | None = None
    """Name of the second expert weight."""
    expert_w3: str | None = None
    """Name of the third expert weight; null when fused with the first."""
    num_experts_attr: str | None = None
    """Attribute with the number of experts."""
    top_k_attr: str | None = None
    """Attribute with the number of experts per token."""
    has_shared_experts: bool | None = None
    """The layer has shared experts."""
    shared_experts_pattern: str | None = None
    """Pattern of their names."""
    shared_experts_gate_pattern: str | None = None
    """Pattern of their gate's name."""
    expert_activation: str | None = None
    """Activation between the expert weights."""
    async_split_plan: bool = False
    """Exchange token counts while computing."""
    row_weighting_impl: str = "auto"
    """How scores weight rows."""
    gate_up_impl: str = "separate"
    """How the first and third weights are multiplied."""
    comm_backend: str = "comm"
    """Library of the token exchange."""
    comm_num_sm: Positive = 12
    """Multiprocessors for it."""
    comm_qp_margin: Count = 4
    """Spare queue pairs for it."""
    comm_max_tokens_per_rank: Count = 0
    """Bound of its buffers; 0 finds one."""


class Compile(Section):
    """Upstream's DeepCompile passes; they count where `deepcompile` is true. `engine.compile(...)` needs no section."""

    deepcompile: bool = False
    """Let a compiler pass schedule ZeRO's communication."""
    free_activation: bool = False
    """Free activations early."""
    free_activation_threshold: Count = 10 * 1024 * 1024
    """Bytes from which on to do so."""
    offload_activation: bool = False
    """Offload activations."""
    offload_activation_pin_memory: bool = True
    """Use page-locked memory for it."""
    offload_opt_states: bool = False
    """Offload optimizer state."""
    double_buffer: bool = True
    """Use two buffers per reduction."""
    symmetric_memory: bool = False
    """Use symmetric memory."""
    debug_log: bool = False
    """Log the passes."""
    offload_parameters: bool = False
    """Offload parameters."""
    sync_before_reduce: bool = False
    """Synchronise before a reduction."""
    sync_after_reduce: bool = False
    """Synchronise after a reduction."""
    sync_before_allgather: bool = False
    """Synchronise before a gather."""
    sync_after_allgather: bool = False
    """Synchronise after a gather."""
    keep_int_input_tensors: bool = True
    """Keep integer inputs alive."""
    keep_all_input_tensors: bool = False
    """Keep all inputs alive."""
    passes: tuple[Literal["z1", "z3", "autosp", "autotp"], ...] | None = None
    """The passes to run."""
    autoep_non_moe: bool = False
    """Run passes on the parts without experts."""


class HybridEngine(Section):
    """An engine that alternates training and generation (docs/hybrid.md)."""

    enabled: bool = False
    """Use it."""
    max_out_tokens: Positive = 512
    """Most tokens of a sequence, prompt and answer."""
    inference_tp_size: Positive = 1
    """Ranks that generate together."""
    release_inference_cache: bool = False
    """Free keys and values after each generate; otherwise with train()."""
    pin_parameters: bool = True
    """Keep fused weights in pinned memory."""
    tp_gather_partition_size: Integer = 8
    """Parameters per gather."""
    enable_cuda_graph: bool = False
    """Use CUDA graphs."""


class Kernels(Section):
    """Fused operations in a Hugging Face model's modules (docs/ds-kernels.md); `destroy` takes them out again."""

    enabled: bool = False
    """Put them in. Results stay within the rounding of the model's dtype."""
    only: tuple[Literal["norm", "mlp", "rope", "attention", "loss"], ...] = ("norm", "mlp", "rope", "attention", "loss")
    """Which. With the loss, training steps that are given labels return no logits."""
