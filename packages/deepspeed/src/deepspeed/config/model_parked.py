"""Sections of niche and legacy features that are recognised, and refused while enabled (see `support`).

They are typed so that a disabled block is checked like any other; the innermost parts of removed features are
`FreeForm`, since nothing here would ever read them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from deepspeed.config.base import Count, Fraction, FreeForm, NonNegative, PathText, Positive, Real, Section

__all__ = [
    "Autotuning",
    "Eigenvalue",
    "Elasticity",
    "LegacyCurriculum",
    "Nebula",
    "ProgressiveLayerDrop",
    "QuantizeTraining",
    "WeightQuantization",
]


class LegacyCurriculum(Section):
    """Upstream's older curriculum block."""

    enabled: bool = False
    """Use it."""
    curriculum_type: str | None = None
    """seqlen or a name of one's own."""
    min_difficulty: Count | None = None
    """First difficulty."""
    max_difficulty: Count | None = None
    """Last difficulty."""
    schedule_type: str | None = None
    """Kind of schedule."""
    schedule_config: FreeForm = Field(default_factory=dict)
    """Its parameters."""


class Elasticity(Section):
    """Batch sizes that fit many world sizes."""

    enabled: bool = False
    """Use it."""
    max_train_batch_size: Positive = 2000
    """Largest batch."""
    micro_batch_sizes: tuple[int, ...] = (2, 4, 6)
    """Micro-batches allowed."""
    min_gpus: Positive = 1
    """Fewest devices."""
    max_gpus: Positive = 10_000
    """Most devices."""
    num_gpus_per_node: Positive = 1
    """Devices of a node."""
    model_parallel_size: Positive = 1
    """Ranks per model."""
    min_time: Count = 0
    """Minutes between changes."""
    prefer_larger_batch: bool = True
    """Prefer the larger of two batches."""
    ignore_non_elastic_batch_info: bool = False
    """Ignore the batch keys."""
    version: Real = 0.2
    """Version of the rules."""


class ModelInfo(Section):
    """What the tuner knows of the model."""

    profile: bool = False
    """Measure it."""
    num_params: Count | None = None
    """Parameters."""
    hidden_size: Count | None = None
    """Width."""
    num_layers: Count | None = None
    """Depth."""


class Autotuning(Section):
    """Search for a fast config by experiments."""

    enabled: bool = False
    """Use it."""
    fast: bool = True
    """Tune the micro-batch only."""
    results_dir: PathText = "autotuning_results"
    """Folder of results."""
    exps_dir: PathText = "autotuning_exps"
    """Folder of experiments."""
    overwrite: bool = True
    """Repeat old experiments."""
    start_profile_step: Count = 3
    """First measured step."""
    end_profile_step: Count = 5
    """Last measured step."""
    metric: Literal["throughput", "latency", "flops"] = "throughput"
    """What is optimised."""
    metric_path: PathText | None = None
    """File of the metric."""
    tuner_type: Literal["gridsearch", "random", "model_based"] = "gridsearch"
    """How to search."""
    tuner_early_stopping: Count = 5
    """Trials without gain."""
    tuner_num_trials: Count = 50
    """Trials in all."""
    arg_mappings: FreeForm | None = None
    """Script arguments for config keys."""
    model_info: ModelInfo = ModelInfo()
    """The model."""
    model_info_path: PathText | None = None
    """File of it."""
    mp_size: Positive = 1
    """Ranks per model."""
    max_train_batch_size: Positive | None = None
    """Largest batch."""
    min_train_batch_size: Positive = 1
    """Smallest batch."""
    max_train_micro_batch_size_per_gpu: Positive = 1024
    """Largest micro-batch."""
    min_train_micro_batch_size_per_gpu: Positive = 1
    """Smallest micro-batch."""
    num_tuning_micro_batch_sizes: Positive = 3
    """Micro-batches tried."""


class Eigenvalue(Section):
    """Curvature estimates of upstream's quantisation training."""

    enabled: bool = False
    """Use them."""
    verbose: bool = False
    """Log them."""
    max_iter: Positive = 100
    """Iterations."""
    tol: NonNegative = 1e-2
    """Tolerance."""
    stability: NonNegative = 1e-6
    """Added for stability."""
    gas_boundary_resolution: Positive = 1
    """Steps between estimates."""
    layer_name: str = "bert.encoder.layer"
    """Prefix of layer names."""
    layer_num: Count = 0
    """Layers."""


class ProgressiveLayerDrop(Section):
    """Skip layers at random, more as training goes on."""

    enabled: bool = False
    """Use it."""
    theta: Fraction = 1.0
    """Share of layers kept in the end."""
    gamma: NonNegative = 0.001
    """Speed."""


class Nebula(Section):
    """Upstream's checkpoint service of a cloud provider."""

    enabled: bool = False
    """Use it."""
    nebula_load_path: PathText | None = None
    """Where to load from."""
    enable_nebula_load: bool = True
    """Load through it."""
    persistent_storage_path: PathText | None = None
    """Where to save to."""
    persistent_time_interval: Positive = 100
    """Seconds between saves."""
    num_of_version_in_retention: Positive = 2
    """Checkpoints kept."""


class QuantizeTraining(Section):
    """Upstream's older quantisation training; its contents are not checked."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = False
    """Use it."""
    eigenvalue: Eigenvalue = Eigenvalue()
    """Curvature estimates."""


class WeightQuantization(Section):
    """Weights quantised at load time (ZeRO-Inference)."""

    enabled: bool = True
    """Use it."""
    quantized_initialization: FreeForm = Field(default_factory=dict)
    """num_bits, group_size, group_dim, symmetric at zero.Init."""
    post_init_quant: FreeForm = Field(default_factory=dict)
    """The same by pattern of module names."""
    num_bits: Positive = 8
    """Bits."""
    q_type: str = "symmetric"
    """symmetric or asymmetric."""
    q_groups: Positive = 1
    """Groups."""
