"""Activation checkpointing: forget what a function computed, compute it again in the backward pass.

Owns `configure`, the settings it makes, and `checkpoint`, which is torch's checkpoint (`torch.utils.checkpoint`) plus
what torch has not: named random states replayed, arguments kept in host memory or divided over model-parallel ranks.
Method: Chen et al. 2016, arXiv:1604.06174.

The settings are those of the process, because the interface has no object to keep them in; `checkpoint` reads them
when it is called. They change where memory is spent, never a value: gradients are the same bits with each of them.

What the settings do:
- `checkpoint_in_cpu`: the arguments wait in host memory.
- `partition_activations`: each model-parallel rank keeps a part of the arguments. No effect without model parallelism.
- `contiguous_checkpointing`: accepted; torch's allocator keeps arguments in blocks of fitting size by itself, so there
  is no buffer to manage (and `num_checkpoints`, its size, has no effect). Needs `partition_activations`, as upstream.
- `synchronize`: wait for the device before and after the function. `profile`: log how long its forward takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ds_comm.device
from deepspeed.runtime.activation_checkpointing.policy import Policy, RecomputePlan
from deepspeed.runtime.activation_checkpointing.rng import (
    MODEL_PARALLEL_RNG,
    MODEL_PARALLEL_SEED_OFFSET,
    CudaRNGStatesTracker,
    get_cuda_rng_tracker,
    seed_model_parallel,
)
from deepspeed.runtime.activation_checkpointing.storage import ArgumentStorage
from deepspeed.timers import SynchronizedWallClockTimer
from deepspeed.utils.logging import logger

__all__ = [
    "CheckpointFunction",
    "CudaRNGStatesTracker",
    "RecomputePlan",
    "apply_policy",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]


@dataclass(frozen=True)
class Settings:
    """What `configure` chose."""

    mpu: Any = None
    partition_activations: bool = False
    contiguous_checkpointing: bool = False
    num_checkpoints: int | None = None
    checkpoint_in_cpu: bool = False
    synchronize: bool = False
    profile: bool = False


# Names of the settings in the section `activation_checkpointing` of the configuration.
_CONFIG_KEYS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}

_settings: Settings | None = None
_timers = SynchronizedWallClockTimer()


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Choose the settings of this process, for all later calls of `checkpoint`.

    Args:
        mpu_: object with `get_model_parallel_{group,world_size,rank}`, or None without model parallelism.
        deepspeed_config: path of a JSON file, dict, or an object with the section `activation_checkpointing`.
        the others: override what the section says; None leaves it.

    Raises:
        ValueError: `contiguous_checkpointing` without `partition_activations`.
    """
    global _settings
    section = _section(deepspeed_config)
    given: dict[str, Any] = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    for name, key in _CONFIG_KEYS.items():
        configured = section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)
        if given[name] is None and configured is not None:
            given[name] = configured
    chosen = Settings(mpu=mpu_, **{name: value for name, value in given.items() if value is not None})
    if chosen.contiguous_checkpointing and not chosen.partition_activations:
        raise ValueError(
            "contiguous_checkpointing (activation_checkpointing.contiguous_memory_optimization) is on and "
            "partition_activations is off; it is an option of partitioned activations, so switch both on or both off"
        )
    _settings = chosen


def _section(config: Any) -> Any:
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if isinstance(config, Mapping):
        return config.get("activation_checkpointing", {})
    section = getattr(config, "activation_checkpointing_config", None)
    return section if section is not None else getattr(config, "activation_checkpointing", None)


def is_configured() -> bool:
    """Whether `configure` was called since the start or the last `reset`."""
    return _settings is not None


def reset() -> None:
    """Forget the settings: as if `configure` had never been called."""
    global _settings
    _settings = None


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Switch `partition_activations` alone."""
    global _settings
    _settings = replace(_settings or Settings(), partition_activations=partition_activation)


def set_num_layers(nlayers: int) -> None:
    """Number of checkpoints per pass; only contiguous buffers would need it (see `configure`)."""
    global _settings
    _settings = replace(_settings or Settings(), num_checkpoints=nlayers)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """Run `function(*args, **kwargs)` keeping its arguments only; its inside is computed again in the backward pass.

    Random numbers are replayed: dropout draws the same mask both times, also under a fork of `get_cuda_rng_tracker`.

    Args:
        use_reentrant: which of torch's two ways. The default needs no argument that requires a gradient and allows
            `torch.autograd.grad`; the reentrant one is for code that was built around it.
    """
    settings = _settings or Settings()
    with _storage(settings), _observed(settings):
        return torch_checkpoint(_Replayed(function), *args, use_reentrant=use_reentrant, **kwargs)


non_reentrant_checkpoint = checkpoint


def apply_policy(
    model: nn.Module, policy: Policy, *, interval: int = 1, budget: int | None = None, units: Any = None
) -> RecomputePlan:
    """Recompute the blocks of a model in backward, without a change of its code (see `policy`).

    Args:
        model: any module with repeated blocks, before or after `deepspeed.initialize`.
        policy: "none", "full", "selective" or "budget"; the last call counts.
        interval: apply it to every so many-th block only, beginning with the first.
        budget: for "budget": bytes that the blocks may keep from forward to backward, per rank and micro-batch.
        units: names or classes of the blocks instead of the automatic choice, as in `ds_zero.shard`.
    Returns:
        what it does per block (`modes`); `close()` ends it.
    Raises:
        DeepSpeedConfigError (ValueError): an unknown policy, or a budget without the policy "budget".
    """
    return RecomputePlan(model, policy, interval=interval, budget=budget, units=units, checkpoint=checkpoint)


class CheckpointFunction:
    """Upstream's autograd function, as far as it is called directly: `CheckpointFunction.apply`."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Reentrant `checkpoint` of `run_function(*args)`; its outputs are also appended to `all_outputs`."""
        outputs = checkpoint(run_function, *args, use_reentrant=True)
        all_outputs.extend(outputs if isinstance(outputs, tuple | list) else [outputs])
        return outputs


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default random state with `seed` and `model-parallel-rng` with seed + 2718 + model-parallel rank."""
    seed_model_parallel(seed, _model_parallel_rank())


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Begin `model-parallel-rng` anew at seed + 2718 + model-parallel rank; the default state stays as it is."""
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(MODEL_PARALLEL_RNG, seed + MODEL_PARALLEL_SEED_OFFSET + _model_parallel_rank())


def _model_parallel_rank() -> int:
    mpu = _settings.mpu if _settings is not None else None
    return int(mpu.get_model_parallel_rank()) if mpu is not None else 0


def _storage(settings: Settings) -> AbstractContextManager[Any]:
    mpu = settings.mpu
    divide = settings.partition_activations and mpu is not None and mpu.get_model_parallel_world_size() > 1
    if not (divide or settings.checkpoint_in_cpu):
        return nullcontext()
    storage = ArgumentStorage(settings.checkpoint_in_cpu, mpu.get_model_parallel_group() if divide else None)
    return saved_tensors_hooks(storage.pack, storage.unpack)


class _observed:
    """Waits for the device around a function and times it, as the settings say."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __enter__(self) -> None:
        if self.settings.synchronize:
            ds_comm.device.synchronize()
        if self.settings.profile:
            _timers("checkpoint forward").start()

    def __exit__(self, *error: object) -> None:
        if self.settings.profile:
            _timers("checkpoint forward").stop()
            logger.info(f"activation checkpoint: forward took {_timers('checkpoint forward').elapsed():.2f} ms")
        if self.settings.synchronize:
            ds_comm.device.synchronize()


class _Replayed:
    """A function whose second call, the recomputation, sees the named random states of its first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.states: dict[str, torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracker = get_cuda_rng_tracker()
        if self.states is None:
            self.states = tracker.get_states()
            return self.function(*args, **kwargs)
        now = tracker.get_states()
        tracker.set_states(self.states)
        try:
            return self.function(*args, **kwargs)
        finally:
            tracker.set_states(now)
