"""Sections about numbers: `fp16`, `bf16`, `amp`, `torch_autocast`, `data_types`.

The model dtype is fp16 or bf16 when that section is enabled (never both), else fp32. A master is the fp32 copy that
the optimizer updates.
"""

from __future__ import annotations

from pydantic import ConfigDict, model_validator

from deepspeed.config.base import Count, FloatDtype, NonNegative, Section

__all__ = ["Amp", "Bf16", "DataTypes", "Fp16", "TorchAutocast"]


class Fp16(Section):
    """fp16 model with fp32 master weights and loss scaling."""

    enabled: bool = False
    """Hold the model in fp16. Excludes bf16."""
    auto_cast: bool = False
    """Cast floating point inputs of the model to fp16 at the engine's forward."""
    loss_scale: NonNegative = 0.0
    """Fixed loss scale; 0 chooses dynamic loss scaling."""
    initial_scale_power: Count = 16
    """The dynamic scale starts at 2 to this power."""
    loss_scale_window: Count = 1000
    """Double the scale after this many clean steps."""
    hysteresis: Count = 2
    """Overflows tolerated before the scale is halved."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis after every clean step."""
    min_loss_scale: Count = 1
    """The dynamic scale never goes below this; an overflow at this scale is an error."""
    fp16_master_weights_and_grads: bool = False
    """Keep the master weights and gradients in fp16."""

    @model_validator(mode="after")
    def _dynamic_needs_positive(self) -> Fp16:
        if self.loss_scale == 0:
            for key in ("loss_scale_window", "hysteresis", "min_loss_scale"):
                if getattr(self, key) < 1:
                    raise ValueError(
                        f"{key} must be at least 1 with dynamic loss scaling (loss_scale 0), got {getattr(self, key)}"
                    )
        return self

    @property
    def dynamic(self) -> bool:
        """Whether the loss scale adapts itself."""
        return self.loss_scale == 0

    @property
    def initial_scale(self) -> float:
        """The loss scale of the first step."""
        return 2.0**self.initial_scale_power if self.dynamic else self.loss_scale


class Bf16(Section):
    """bf16 model with fp32 master weights."""

    enabled: bool = False
    """Hold the model in bf16. Excludes fp16."""
    immediate_grad_update: bool = False
    """Add each gradient to the fp32 accumulator inside backward."""
    check_grad_overflow: bool = True
    """Skip the step when a gradient is inf or nan."""
    bf16_master_weights_and_grads: bool = False
    """Keep the master weights and gradients in bf16."""
    bf16_optimizer_states: bool = False
    """Keep the optimizer's moments in bf16."""


class Amp(Section):
    """Apex mixed precision, removed upstream: recognised to be refused."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = False
    """Use Apex amp."""


class TorchAutocast(Section):
    """Run forward under `torch.autocast`."""

    enabled: bool = False
    """Run the model's forward under torch.autocast."""
    dtype: FloatDtype | None = None
    """The low dtype; none takes torch's default for the device."""
    lower_precision_safe_modules: tuple[str, ...] | None = None
    """Fully qualified names of module classes whose parameters and gradients may be communicated in the low dtype."""


class DataTypes(Section):
    """Dtypes that differ from the model's."""

    grad_accum_dtype: FloatDtype | None = None
    """Dtype of the accumulated gradient that reaches the optimizer; none takes the model dtype."""
    param_dtype: FloatDtype | None = None
    """Must equal the model dtype that fp16/bf16 choose; a check, not a switch."""
    buffer_dtype: FloatDtype | None = None
    """Cast the module's floating point buffers to this dtype; none leaves them as loaded."""
    keep_in_fp32_modules: tuple[str, ...] | None = None
    """Patterns of modules that stay in fp32 in a 16-bit model."""
