"""Rules over several keys, and names that must exist: what a single field cannot check.

Each rule is a function of the validated config (and of the device, where it matters) that returns problems as texts;
`check` raises them together.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Literal

import torch

from deepspeed import lr_schedules
from deepspeed.config.enforce import refused_keys
from deepspeed.config.model import ConfigModel
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError

__all__ = ["DEEPSPEED_OPTIMIZERS", "check", "ignored_placements", "model_dtype"]

DEEPSPEED_OPTIMIZERS: dict[str, str] = {
    name.lower(): name for name in ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
}
"""Names matched in any case -> the spelling of upstream. Other names are classes of torch.optim."""

_GONE_OPTIMIZERS = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD")
_WIDTH = {"fp16": 16, "bf16": 16, "fp32": 32}


def model_dtype(config: ConfigModel) -> Literal["fp32", "bf16", "fp16"]:
    """The dtype of the model: "fp16", "bf16" or "fp32"."""
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def check(config: ConfigModel, origin: str, device_type: str) -> None:
    """Raise for everything in a validated config that cannot be done: unsupported keys, contradictions, unknown
    class names.

    Contradictions raise ConfigConflictError, the rest DeepSpeedConfigError; all problems of a kind are in one text.
    """
    conflicts = [*_precision(config), *_activation(config)]
    if conflicts:
        raise ConfigConflictError(_joined(conflicts, origin))
    problems = [
        f"not supported yet: {path} (value {value!r}): {entry.note}. Remove the key or switch the feature off"
        for path, value, entry in refused_keys(config)
    ]
    problems += [*_communication(config), *_offload(config, device_type), *_optimizer(config), *_scheduler(config)]
    if problems:
        raise DeepSpeedConfigError(_joined(problems, origin))


def _joined(problems: list[str], origin: str) -> str:
    if len(problems) == 1:
        return f"{problems[0]} ({origin})"
    return f"{len(problems)} problems in the DeepSpeed config ({origin}):\n  - " + "\n  - ".join(problems)


def _precision(config: ConfigModel) -> Iterator[str]:
    if config.fp16.enabled and config.bf16.enabled:
        yield "fp16.enabled and bf16.enabled are both true, but a model has one dtype; enable one of them"
    wanted = config.data_types.param_dtype
    if wanted is not None and wanted != model_dtype(config):
        yield (
            f"data_types.param_dtype is {wanted}, but fp16.enabled={config.fp16.enabled} and "
            f"bf16.enabled={config.bf16.enabled} "
            f"make the model {model_dtype(config)}; change one of them"
        )


def _activation(config: ConfigModel) -> Iterator[str]:
    section = config.activation_checkpointing
    if section.contiguous_memory_optimization and not (section.partition_activations and section.number_checkpoints):
        yield (
            "activation_checkpointing.contiguous_memory_optimization needs partition_activations (it is "
            f"{section.partition_activations}) and number_checkpoints (it is {section.number_checkpoints})"
        )
    policy = section.policy or (None if section.policy_budget is None else "budget")
    if (policy == "budget") != (section.policy_budget is not None):
        yield (
            f"activation_checkpointing.policy is {section.policy!r} and policy_budget is {section.policy_budget};"
            " give policy_budget (bytes per rank) together with the policy 'budget', and with no other"
        )
    if config.pipeline.activation_checkpoint_interval and policy not in (None, "none"):
        yield (
            f"pipeline.activation_checkpoint_interval {config.pipeline.activation_checkpoint_interval} and"
            f" activation_checkpointing.policy {policy!r} would recompute layers twice; give one of them"
        )


def _communication(config: ConfigModel) -> Iterator[str]:
    wanted, dtype = config.communication_data_type, model_dtype(config)
    if wanted is not None and wanted != dtype and _WIDTH[wanted] <= _WIDTH[dtype]:
        yield (
            f"not supported yet: communication_data_type {wanted} with a {dtype} model: gradients travel in the "
            "model dtype and are summed in fp32. "
            f"Remove the key, or set it to {dtype} or fp32"
        )


def _placements(config: ConfigModel) -> Iterator[tuple[str, str, bool]]:
    """The offload blocks that ask for another device: (name, device, whether the stage has such states to move)."""
    zero = config.zero_optimization
    if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none":
        yield "offload_optimizer", zero.offload_optimizer.device, zero.stage >= 1
    if zero.offload_param is not None and zero.offload_param.device != "none":
        yield "offload_param", zero.offload_param.device, zero.stage == 3


def ignored_placements(config: ConfigModel) -> Iterator[tuple[str, str]]:
    """The offload devices that change nothing in a config that passed `check`: (key, reason)."""
    for name, _, applies in _placements(config):
        reason = (
            "states are in host memory anyway"
            if applies
            else f"stage {config.zero_optimization.stage} has no such shards"
        )
        yield f"zero_optimization.{name}.device", reason


def _offload(config: ConfigModel, device_type: str) -> Iterator[str]:
    for name, device, applies in _placements(config):
        if applies and (device == "nvme" or device_type != "cpu"):
            yield (
                f"not supported yet: zero_optimization.{name}.device {device} on a {device_type} host: states "
                "stay on the device they are used on. "
                'Set it to "none"'
            )


def _optimizer(config: ConfigModel) -> Iterator[str]:
    if config.optimizer is None:
        return
    name, params = config.optimizer.type, config.optimizer.params
    if "max_grad_norm" in params:
        yield (
            f"optimizer.params.max_grad_norm (value {params['max_grad_norm']!r}) is not a parameter of the optimizer; "
            "set the top-level key gradient_clipping instead"
        )
    gone = {optimizer.lower(): optimizer for optimizer in _GONE_OPTIMIZERS}
    if name.lower() in DEEPSPEED_OPTIMIZERS:
        return
    if name.lower() in gone:
        yield (
            f'not supported: optimizer.type "{gone[name.lower()]}": not planned (upstream removed it, or it needs'
            " another package). Use AdamW, or pass an optimizer object to initialize"
        )
        return
    classes = [
        n
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and n != "Optimizer"
    ]
    if name not in classes:
        yield _unknown("optimizer.type", name, [*DEEPSPEED_OPTIMIZERS.values(), *classes], "torch.optim")


def _scheduler(config: ConfigModel) -> Iterator[str]:
    if config.scheduler is None:
        return
    name = config.scheduler.type
    if name not in lr_schedules.VALID_LR_SCHEDULES and not inspect.isclass(
        getattr(torch.optim.lr_scheduler, name, None)
    ):
        public = [
            n
            for n, c in vars(torch.optim.lr_scheduler).items()
            if inspect.isclass(c) and n[0] != "_" and hasattr(c, "get_last_lr")
        ]
        yield _unknown("scheduler.type", name, [*lr_schedules.VALID_LR_SCHEDULES, *public], "torch.optim.lr_scheduler")


def _unknown(path: str, name: str, known: list[str], module: str) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[near[0]]}?" if near else f"known: {', '.join(dict.fromkeys(known))}"
    return f"{path}: there is no {name!r} in DeepSpeed or {module} (case matters); {hint}"
