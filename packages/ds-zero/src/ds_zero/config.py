"""Configuration of ds_zero: one frozen pydantic model, upstream's key names where upstream has the key.

Every field changes something observable (tests walk them all). A `stage` is a layout: what of a unit is sharded.
Sizes are in elements unless the name says nbytes.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

__all__ = ["LossScaleConfig", "ZeroConfig"]

DTypeName = Literal["fp32", "bf16", "fp16"]


class LossScaleConfig(BaseModel):
    """fp16 loss scaling; upstream's keys of the `fp16` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss_scale: float = Field(default=0.0, ge=0)
    """Static scale; 0 means dynamic."""
    initial_scale_power: int = Field(default=16, ge=0)
    """A dynamic scale starts at 2**initial_scale_power."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """Clean steps after which a dynamic scale is doubled."""
    hysteresis: int = Field(default=2, ge=1)
    """Overflows tolerated before a dynamic scale is halved."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis after every clean step."""
    min_loss_scale: float = Field(default=1.0, gt=0)
    """A dynamic scale never falls below this; an overflow there raises."""


class ZeroConfig(BaseModel):
    """How a model is sharded, in which precision it trains, and how its gradients travel."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    stage: int = Field(default=0, ge=0, le=3)
    """0: replicate; 1: shard optimizer state; 2: + gradients; 3: + parameters."""
    dtype: DTypeName | None = None
    """Parameters are cast to this; None keeps each parameter's own dtype. 16-bit parameters get an fp32 master."""
    grad_accum_dtype: DTypeName | None = None
    """The mean gradient is rounded to this before the norm and the update; None: the parameter's dtype."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per step; gradients are divided by it. 1 saves the fp32 accumulation buffer."""
    gradient_reduction: Literal["mean", "sum"] = "mean"
    """mean divides by ranks times accumulation steps; sum divides by nothing."""
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Largest global L2 norm; 0 leaves gradients alone."""
    skip_nonfinite: bool | None = None
    """A step with inf/NaN gradients is skipped (True) or raises (False). None: skip if 16-bit, raise if fp32."""
    check_nonfinite: bool = True
    """False applies gradients without looking (bf16 and fp32 only)."""
    loss_scaling: LossScaleConfig = LossScaleConfig()
    """Used by fp16 models only."""

    overlap_comm: bool | None = None
    """Reduce during backward without waiting for slower ranks (None: yes); False waits for every unit at once."""
    reduce_scatter: bool = True
    """False reduces by all-reduce (twice the bytes) and keeps the own shard."""
    reduce_bucket_size: int = Field(default=500_000_000, gt=0)
    """At most so many elements per reduction; larger units go in several."""
    allgather_bucket_size: int = Field(default=500_000_000, gt=0)
    """At most so many elements per all-gather of updated parameters (stages 1 and 2)."""
    sub_group_size: int = Field(default=1_000_000_000, gt=0)
    """At most so many elements are handed to the optimizer in one call (their fp32 gradients exist at a time)."""
    ignore_unused_parameters: bool = True
    """False raises when a trainable parameter got no gradient in a backward, naming it."""
    prefetch_bucket_size: int = Field(
        default=50_000_000, ge=0, validation_alias=AliasChoices("prefetch_bucket_size", "stage3_prefetch_bucket_size")
    )
    """Stage 3: elements gathered ahead of their use (transports that copy)."""
    param_persistence_threshold: int = Field(
        default=100_000,
        ge=0,
        validation_alias=AliasChoices("param_persistence_threshold", "stage3_param_persistence_threshold"),
    )
    """Stage 3: parameters with at most so many elements stay gathered."""
    model_persistence_threshold: int = Field(
        default=sys.maxsize,
        ge=0,
        validation_alias=AliasChoices("model_persistence_threshold", "stage3_model_persistence_threshold"),
    )
    """Stage 3: at most so many elements stay gathered in all."""
    max_live_parameters: int = Field(
        default=1_000_000_000, ge=0, validation_alias=AliasChoices("max_live_parameters", "stage3_max_live_parameters")
    )
    """Stage 3: prefetch stops at so many gathered elements."""
    max_reuse_distance: int = Field(
        default=0, ge=0, validation_alias=AliasChoices("max_reuse_distance", "stage3_max_reuse_distance")
    )
    """Stage 3: a unit used again within so many elements is kept. 0 (upstream: 1e9) keeps memory at the law."""
