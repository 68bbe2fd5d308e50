"""Upstream's path of loss scaling: its names and arguments over `ds_zero.precision.LossScaler`, which has the rules.

Old checkpoints are pickles that name these classes. Unpickled (only after an explicit opt-in), they take over scale,
window and hysteresis, so training goes on at the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from deepspeed._lazy import explain_absent
from ds_zero.config import LossScaleConfig
from ds_zero.precision import LossScaler as Rules

INITIAL_LOSS_SCALE = "init_scale"
SCALE_WINDOW = "scale_window"
DELAYED_SHIFT = "delayed_shift"
CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
MIN_LOSS_SCALE = "min_scale"


class LossScalerBase:
    """A loss scale with upstream's surface."""

    dynamic = False
    _rules: Rules

    @property
    def cur_scale(self) -> float:
        """What the loss is multiplied with now."""
        return self._rules.scale

    @property
    def loss_scale(self) -> float:
        """The same."""
        return self._rules.scale

    def scale_gradient(self, module: Any, grad_in: tuple[torch.Tensor, ...], grad_out: Any) -> tuple[torch.Tensor, ...]:
        """Backward hook that scales the incoming gradients."""
        return tuple(self.loss_scale * grad for grad in grad_in)

    def update_scale(self, overflow: bool) -> None:
        """Account one step."""
        self._rules.update(overflow)

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Backward of the scaled loss."""
        torch.autograd.backward(loss * self.loss_scale, retain_graph=retain_graph)


class LossScaler(LossScalerBase):
    """A constant scale."""

    def __init__(self, scale: float = 1) -> None:
        self._rules = Rules(LossScaleConfig(loss_scale=scale))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._rules = state["_rules"] if "_rules" in state else Rules(LossScaleConfig(loss_scale=state["cur_scale"]))


class DynamicLossScaler(LossScalerBase):
    """A scale that is halved on overflow (after `delayed_shift` of them) and doubled after `scale_window` clean steps.

    Args:
        init_scale: first scale.
        min_scale: the scale never falls below it.
        delayed_shift: overflows tolerated before the scale is halved.
        consecutive_hysteresis: refill that tolerance after every clean step.
    """

    dynamic = True

    def __init__(
        self,
        init_scale: float = 2**32,
        scale_factor: float = 2.0,
        scale_window: int = 1000,
        min_scale: float = 1,
        delayed_shift: int = 1,
        consecutive_hysteresis: bool = False,
        raise_error_at_min_scale: bool = True,
        dtype: torch.dtype = torch.half,
    ) -> None:
        if scale_factor != 2.0:
            raise ValueError(f"scale_factor is {scale_factor}; only 2 is supported (a power of two changes no bit)")
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self.dtype = dtype
        self._rules = Rules(
            LossScaleConfig(
                initial_scale_power=max(0, round(math.log2(init_scale))),
                loss_scale_window=scale_window,
                hysteresis=delayed_shift,
                consecutive_hysteresis=consecutive_hysteresis,
                min_loss_scale=min_scale,
            )
        )
        self._rules.scale = float(init_scale)

    def update_scale(self, overflow: bool) -> None:
        at_minimum = (
            overflow and self._rules.hysteresis_left <= 1 and self.cur_scale <= self._rules.config.min_loss_scale
        )
        if at_minimum and not self.raise_error_at_min_scale:
            return
        super().update_scale(overflow)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        if "_rules" in state:
            self.__dict__.update(state)
            return
        names = ("scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis", "raise_error_at_min_scale")
        DynamicLossScaler.__init__(
            self, init_scale=state["cur_scale"], **{name: state[name] for name in names if name in state}
        )
        self._rules.iteration = state.get("cur_iter", 0)
        self._rules.last_overflow = state.get("last_overflow_iter", -1)
        self._rules.hysteresis_left = state.get("cur_hysteresis", self._rules.hysteresis_left)


def CreateLossScaler(
    dtype: torch.dtype, static_loss_scale: float, dynamic_scaling: bool, dynamic_loss_args: Mapping[str, Any] | None
) -> LossScalerBase:
    """The scaler for a model dtype: dynamic or static in fp16, the constant 1 otherwise."""
    if dtype == torch.half and dynamic_scaling:
        return DynamicLossScaler(dtype=dtype, **dict(dynamic_loss_args or {}))
    return LossScaler(scale=static_loss_scale if dtype == torch.half else 1.0)


explain_absent(__name__)
