"""Upstream's path of the section `zero_optimization` (see `deepspeed.config.model_zero`)."""

from __future__ import annotations

from enum import IntEnum

from deepspeed._lazy import explain_absent
from deepspeed.config.model_zero import ZeroSection as DeepSpeedZeroConfig

__all__ = ["DeepSpeedZeroConfig", "ZeroStageEnum"]


class ZeroStageEnum(IntEnum):
    """Names of the stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


explain_absent(__name__)
