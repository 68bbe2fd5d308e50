"""Optimizers named by the config's `optimizer` section.

"Adam" is AdamW unless `adam_w_mode` is false (as upstream); Adam and AdamW are torch's, whose fused kernel ds_zero
drives. Any other name is a class of torch.optim, spelt exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from deepspeed.errors import DeepSpeedConfigError
from deepspeed.ops.adam import FusedAdam

__all__ = ["build_optimizer"]

ADAM_ONLY = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none")
"""Parameters of upstream's own Adams that torch's do not take."""


def build_optimizer(section: Any, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Make the optimizer of an `optimizer` section over parameters or param groups.

    Raises:
        DeepSpeedConfigError: a name that is no optimizer, or a parameter that it does not take.
    """
    name, params = section.type, dict(section.params or {})
    if name.lower() in ("adam", "adamw"):
        decoupled = name.lower() == "adamw" or params.get("adam_w_mode", True)
        if not params.get("bias_correction", True):
            own = {key: value for key, value in params.items() if key not in ADAM_ONLY or key == "bias_correction"}
            return FusedAdam(list(parameters), adam_w_mode=decoupled, **own)
        cls: Any = torch.optim.AdamW if decoupled else torch.optim.Adam
        params = {key: value for key, value in params.items() if key not in ADAM_ONLY}
        params.setdefault("weight_decay", 0.0)  # upstream's default; torch's AdamW has 0.01
    else:
        cls = torch.optim.Adagrad if name.lower() == "adagrad" else getattr(torch.optim, name, None)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise DeepSpeedConfigError(
            f"optimizer.type {name!r} is neither Adam, AdamW nor Adagrad nor a class of torch.optim; check its spelling"
        )
    params = {key: tuple(value) if key == "betas" else value for key, value in params.items()}
    try:
        inspect.signature(cls).bind(None, **params)
    except TypeError as error:
        raise DeepSpeedConfigError(
            f"optimizer.params of {name}: {error}; it takes {inspect.signature(cls)}, given were {sorted(params)}"
        ) from None
    made: torch.optim.Optimizer = cls(list(parameters), **params)
    return made
