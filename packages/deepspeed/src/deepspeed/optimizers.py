"""Optimizers named by the config's `optimizer` section.

"Adam" is AdamW unless `adam_w_mode` is false (as upstream); Adam and AdamW are torch's, whose fused kernel ds_zero
drives. Lamb, Lion and Muon are those of `deepspeed.ops` and `deepspeed.runtime.zero.muon`. Any other name is a class of
torch.optim, spelt exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deepspeed.errors import DeepSpeedConfigError

__all__ = ["build_optimizer", "flag_parameters", "set_optimizer_flags"]

ADAM_ONLY = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none")
"""Parameters of upstream's own Adams that torch's do not take."""
NOT_MUON = ("embed", "lm_head")
"""Matrices whose names contain one of these are stepped by Muon's auxiliary Adam."""
MUON_ONLY = ("lr", "momentum", "weight_decay", "ns_method")
AUX_ADAM_ONLY = ("lr", "betas", "eps", "weight_decay")


def flag_parameters(model: nn.Module) -> None:
    """Set `use_muon` on every parameter that has no such attribute yet: matrices inside the model, no embeddings."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "use_muon"):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # zero.Init leaves an empty placeholder
            parameter.use_muon = len(shape) >= 2 and not any(part in name.lower() for part in NOT_MUON)  # type: ignore[attr-defined]


def set_optimizer_flags(config_class: Any, model: nn.Module) -> None:
    """Mark the parameters that Muon takes if the config's optimizer is Muon; parameters marked before stay so."""
    if str(getattr(config_class, "optimizer_name", None)).lower() == "muon":
        flag_parameters(model)


def build_optimizer(section: Any, parameters: Iterable[Any], model: nn.Module | None = None) -> torch.optim.Optimizer:
    """Make the optimizer of an `optimizer` section over parameters or param groups.

    Args:
        model: whose names say which matrices Muon takes, unless the parameters have `use_muon` set.
    Raises:
        DeepSpeedConfigError: a name that is no optimizer, or a parameter that it does not take.
    """
    name, params = section.type, dict(section.params or {})
    params = {key: tuple(value) if key == "betas" else value for key, value in params.items()}
    if name.lower() == "muon":
        if model is not None:
            flag_parameters(model)
        return _muon(list(parameters), params)
    cls, params = _class_of(name, params)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise DeepSpeedConfigError(
            f"optimizer.type {name!r} is neither Adam, AdamW, Adagrad, Lamb, Lion nor Muon nor a class of torch.optim;"
            " check its spelling"
        )
    try:
        inspect.signature(cls).bind(None, **params)
    except TypeError as error:
        raise DeepSpeedConfigError(
            f"optimizer.params of {name}: {error}; it takes {inspect.signature(cls)}, given were {sorted(params)}"
        ) from None
    made: torch.optim.Optimizer = cls(list(parameters), **params)
    return made


def _class_of(name: str, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of a name, and the parameters it is to be given."""
    lower = name.lower()
    if lower in ("adam", "adamw"):
        decoupled = lower == "adamw" or params.get("adam_w_mode", True)
        if not params.get("bias_correction", True):
            from deepspeed.ops.adam import FusedAdam

            own = {key: value for key, value in params.items() if key not in ADAM_ONLY or key == "bias_correction"}
            return FusedAdam, own | {"adam_w_mode": decoupled}
        params = {key: value for key, value in params.items() if key not in ADAM_ONLY}
        params.setdefault("weight_decay", 0.0)  # upstream's default; torch's AdamW has 0.01
        return torch.optim.AdamW if decoupled else torch.optim.Adam, params
    if lower == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb, params
    if lower == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion

        return DeepSpeedCPULion, {key: value for key, value in params.items() if key != "set_grad_none"}
    return torch.optim.Adagrad if lower == "adagrad" else getattr(torch.optim, name, None), params


def _muon(parameters: list[Any], params: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon over the parameters with `use_muon`, its Adam over the rest; every param group is split in two."""
    from deepspeed.runtime.zero.muon import MuonWithAuxAdam

    known = {*MUON_ONLY, *AUX_ADAM_ONLY, "muon_lr", "adam_lr"}
    if unknown := sorted(set(params) - known):
        raise DeepSpeedConfigError(f"optimizer.params of Muon: it does not take {unknown}; it takes {sorted(known)}")
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    made = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        for use_muon, keys, rate in ((True, MUON_ONLY, "muon_lr"), (False, AUX_ADAM_ONLY, "adam_lr")):
            chosen = [p for p in members if bool(getattr(p, "use_muon", False)) == use_muon]
            if not chosen:
                continue
            own = {key: params[key] for key in keys if key in params}
            if rate in params:
                own["lr"] = params[rate]
            rest = {key: value for key, value in group.items() if key != "params"}
            made.append(own | rest | {"params": chosen, "use_muon": use_muon})
    return MuonWithAuxAdam(made)
