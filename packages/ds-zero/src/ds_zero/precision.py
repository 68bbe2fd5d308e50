"""Precision: dtype names, and fp16 loss scaling (Micikevicius et al. 2018, "Mixed Precision Training").

The scale multiplies the loss, so gradients stay above fp16's smallest number; the update divides it out again in
fp32. A dynamic scale is halved on overflow and doubled after a window of clean steps. Pure Python numbers: every
rank sees the same norm, so every rank's scaler takes the same path without talking.
"""

from __future__ import annotations

import torch

from ds_zero.config import LossScaleConfig
from ds_zero.errors import NonFiniteGradientError

__all__ = ["DTYPES", "LossScaler", "dtype_name"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16: the spelling used in the shard map and in checkpoints."""
    return str(dtype).removeprefix("torch.")


class LossScaler:
    """A static (`loss_scale > 0`) or dynamic loss scale. `enabled=False` is the constant 1 of bf16 and fp32."""

    def __init__(self, config: LossScaleConfig, enabled: bool = True) -> None:
        self.config = config
        self.enabled = enabled
        self.dynamic = enabled and config.loss_scale == 0
        self.scale = 1.0
        if enabled:
            self.scale = 2.0**config.initial_scale_power if self.dynamic else config.loss_scale
        self.iteration = 0
        self.last_overflow = -1
        self.hysteresis_left = config.hysteresis

    def update(self, overflow: bool, culprit: str = "") -> None:
        """Account one boundary.

        Args:
            overflow: whether the step was skipped for inf/NaN.
            culprit: text naming the first non-finite parameters, for the error.
        Raises:
            NonFiniteGradientError: an overflow although the scale is already at its minimum.
        """
        if self.dynamic:
            if overflow:
                self._shrink(culprit)
            else:
                self._grow()
        self.iteration += 1

    def _shrink(self, culprit: str) -> None:
        self.last_overflow = self.iteration
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
            return
        if self.scale <= self.config.min_loss_scale:
            raise NonFiniteGradientError(
                f"loss scale is already at minimum ({self.config.min_loss_scale:g}) and the gradients still overflow"
                f"{culprit and ' in ' + culprit}; the loss itself is inf or NaN: lower the learning rate, check the"
                " data, or train in bf16"
            )
        self.scale = max(self.scale / 2, self.config.min_loss_scale)

    def _grow(self) -> None:
        if self.config.consecutive_hysteresis:
            self.hysteresis_left = self.config.hysteresis
        clean = self.iteration - self.last_overflow - 1
        if clean > 0 and clean % self.config.loss_scale_window == 0:
            self.scale *= 2
            if not self.config.consecutive_hysteresis:
                self.hysteresis_left = self.config.hysteresis

    def state_dict(self) -> dict[str, float]:
        """Numbers that make a resumed scaler take the same path."""
        return {
            "scale": self.scale,
            "iteration": self.iteration,
            "last_overflow": self.last_overflow,
            "hysteresis_left": self.hysteresis_left,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` gave; a static scale keeps its configured value."""
        if self.dynamic:
            self.scale = float(state["scale"])
        self.iteration = int(state["iteration"])
        self.last_overflow = int(state["last_overflow"])
        self.hysteresis_left = int(state["hysteresis_left"])
