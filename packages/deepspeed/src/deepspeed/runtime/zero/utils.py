"""Upstream's path of `is_zero_param` and of the error of a run and a checkpoint that do not go together."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed._lazy import explain_absent
from ds_zero import ZeroError as ZeRORuntimeException

__all__ = ["ZeRORuntimeException", "is_zero_param"]


def is_zero_param(parameter: Any) -> bool:
    """Whether `parameter` is a tensor that ZeRO-3 (or zero.Init) has sharded."""
    return isinstance(parameter, torch.Tensor) and hasattr(parameter, "ds_id")


explain_absent(__name__)
