"""The `data_efficiency` section: choice of samples and of tokens. Recognised and refused while enabled (see
`support`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepspeed.config.base import Count, FreeForm, Integer, PathText, Positive, Section

__all__ = ["DataEfficiency"]


class CurriculumLearning(Section):
    """Order samples by difficulty."""

    enabled: bool = False
    """Use it."""
    data_cluster_path: PathText | None = None
    """Folder for the index clusters."""
    curriculum_metrics: FreeForm = Field(default_factory=dict)
    """One block per difficulty metric."""


class DynamicBatching(Section):
    """Batches of a fixed number of tokens."""

    enabled: bool = False
    """Use it."""
    metrics_path: PathText | None = None
    """Folder with sequence lengths."""
    lr_scaling_method: Literal["linear", "sqrt", "none"] = "linear"
    """Scale the learning rate with the batch size."""
    min_batch_size: Positive = 1
    """Smallest batch."""
    max_batch_size: Positive | None = None
    """Largest batch."""
    sequence_picking_order: Literal["dataloader", "random", "seqlen"] = "dataloader"
    """Order of sequences."""
    max_tokens: Positive | None = None
    """Tokens per batch."""
    verbose: bool = False
    """Log the batches."""


class DataSampling(Section):
    """Choice of samples."""

    enabled: bool = False
    """Use it."""
    num_epochs: Positive = 1000
    """Epochs planned."""
    num_workers: Count = 0
    """Loader processes."""
    pin_memory: bool = False
    """Use page-locked memory."""
    curriculum_learning: CurriculumLearning = CurriculumLearning()
    """Order by difficulty."""
    dynamic_batching: DynamicBatching = DynamicBatching()
    """Batches by tokens."""


class LayerTokenLr(Section):
    """Learning rate by tokens per layer."""

    enabled: bool = False
    """Use it."""
    total_layer_tokens: Count | None = None
    """Tokens in all layers."""
    warmup_type: str | None = None
    """Kind of warmup."""
    warmup_layer_tokens: Count | None = None
    """Tokens of warmup."""


class RandomLtd(Section):
    """Random layer-wise token dropping."""

    enabled: bool = False
    """Use it."""
    total_layer_num: Count | None = None
    """Layers of the model."""
    random_ltd_layer_num: Count | None = None
    """Layers that drop tokens."""
    random_ltd_layer_id: tuple[int, ...] = ()
    """Their numbers."""
    model_mask_name: str | None = None
    """Name of the mask argument."""
    model_type: Literal["decoder", "encoder"] = "decoder"
    """Kind of model."""
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] = "batch_seq_dim"
    """Order of dimensions."""
    random_ltd_schedule: FreeForm = Field(default_factory=dict)
    """Tokens kept over time."""
    layer_token_lr_schedule: LayerTokenLr = LayerTokenLr()
    """Learning rate schedule."""


class DataRouting(Section):
    """Choice of tokens inside the model."""

    enabled: bool = False
    """Use it."""
    random_ltd: RandomLtd = RandomLtd()
    """Token dropping."""


class DataEfficiency(Section):
    """Data sampling and routing."""

    enabled: bool = False
    """Use any of it."""
    seed: Integer = 1234
    """Seed of the choices."""
    data_sampling: DataSampling = DataSampling()
    """Choice of samples."""
    data_routing: DataRouting = DataRouting()
    """Choice of tokens."""
