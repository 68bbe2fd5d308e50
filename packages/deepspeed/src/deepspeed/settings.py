"""The parts of a config that hold for the whole process, not for one engine: log level, communication log,
checkpointing; and what is done to a model: the policy of recomputation, and kernels.

`initialize` calls `apply_settings` once per engine; the last engine that says something about a setting wins, and one
that says nothing leaves it alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.comm import log as comm_log
from deepspeed.config.resolved import ResolvedConfig
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.activation_checkpointing.policy import RecomputePlan
from deepspeed.utils.logging import log_dist, set_log_level_from_string
from ds_kernels.patch import Applied, apply_kernels

__all__ = ["apply_settings", "fused_kernels", "recompute_plan"]


def apply_settings(config: ResolvedConfig, mpu: Any = None) -> None:
    """Put `log_level`, `comms_logger` and `activation_checkpointing` into effect, each only where the config gives it.

    Args:
        mpu: object with `get_model_parallel_{group,world_size,rank}`, or None.
    """
    if config.log_level is not None:
        set_log_level_from_string(config.log_level)
    if config.given("comms_logger"):
        comm_log.configure(config)
    if config.given("activation_checkpointing"):
        checkpointing.configure(mpu, config)


def recompute_plan(config: ResolvedConfig, model: nn.Module, units: Any) -> RecomputePlan | None:
    """What `activation_checkpointing.policy` makes of a model's blocks; None where the config leaves that to the model.

    Args:
        units: what `ds_zero.shard` was given as units.
    """
    section = config.activation_checkpointing
    policy = section.policy or (None if section.policy_budget is None else "budget")
    if policy is None:
        return None
    return checkpointing.apply_policy(
        model, policy, interval=section.policy_interval, budget=section.policy_budget, units=units
    )


def fused_kernels(config: ResolvedConfig, model: nn.Module) -> Applied | None:
    """Put the section `kernels` into effect on a model; None where it is not enabled.

    Raises:
        ds_kernels.PatchError: the model has no module of a known family, or has kernels already.
    """
    if not config.kernels.enabled:
        return None
    applied = apply_kernels(model, only=config.kernels.only)
    counts = ", ".join(f"{len(names)} {kernel}" for kernel, names in applied.replaced.items()) or "none"
    left = "".join(f"; {name} left alone: {why}" for name, why in applied.skipped.items())
    log_dist(f"kernels: {counts}{left}", ranks=[0])
    return applied
