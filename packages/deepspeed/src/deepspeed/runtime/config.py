"""Upstream's path of the config: `DeepSpeedConfig`, its error, and the writer.

New code calls `deepspeed.config.resolve`, which is told the number of data-parallel ranks; this class finds it out
the way upstream does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepspeed._lazy import explain_absent
from deepspeed.config import ResolvedConfig, load_config, resolve
from deepspeed.config.model_precision import Bf16, Fp16
from deepspeed.config.model_zero import ZeroSection
from deepspeed.config.source import ConfigSource
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.runtime.config_utils import ScientificNotationEncoder, get_config_default, pp_int

__all__ = [
    "ADAGRAD_OPTIMIZER",
    "ADAMW_OPTIMIZER",
    "ADAM_OPTIMIZER",
    "DEEPSPEED_OPTIMIZERS",
    "LAMB_OPTIMIZER",
    "LION_OPTIMIZER",
    "MUON_OPTIMIZER",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedConfigWriter",
    "ScientificNotationEncoder",
    "get_config_default",
    "pp_int",
]

ADAGRAD_OPTIMIZER = "adagrad"
ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
MUON_OPTIMIZER = "muon"
DEEPSPEED_OPTIMIZERS = [
    ADAGRAD_OPTIMIZER,
    ADAM_OPTIMIZER,
    ADAMW_OPTIMIZER,
    LAMB_OPTIMIZER,
    LION_OPTIMIZER,
    MUON_OPTIMIZER,
]


class DeepSpeedConfig:
    """A resolved config under upstream's name and attributes.

    The number of data-parallel ranks is, in this order: what `mpu` says (`get_data_parallel_world_size`, else the
    world divided by `get_sequence_parallel_world_size`), the "data_parallel" axis of `mesh_device`, else the world
    divided by the config's `sequence_parallel_size`: that of torch.distributed when it is initialised, else WORLD_SIZE
    as a launcher sets it, else 1. Raises DeepSpeedConfigError as `resolve` does.
    """

    def __init__(self, config: ConfigSource, mpu: Any = None, mesh_device: Any = None) -> None:
        self.world_size = _data_parallel_ranks(mpu, mesh_device, load_config(config).raw)
        self.resolved: ResolvedConfig = resolve(config, dp_world_size=self.world_size)
        self._param_dict: Mapping[str, Any] = self.resolved.raw

    @property
    def train_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.resolved.train_batch_size

    @property
    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass of a rank."""
        return self.resolved.train_micro_batch_size_per_gpu

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per step."""
        return self.resolved.gradient_accumulation_steps

    @property
    def gradient_clipping(self) -> float:
        """Largest gradient norm, 0 for none."""
        return self.resolved.gradient_clipping

    @property
    def optimizer_name(self) -> str | None:
        """The optimizer's type, in lower case where it is one of DeepSpeed's own; None without a section."""
        section = self.resolved.optimizer
        if section is None:
            return None
        lower = section.type.lower()
        return lower if lower in DEEPSPEED_OPTIMIZERS else section.type

    @property
    def zero_config(self) -> ZeroSection:
        """The `zero_optimization` section."""
        return self.resolved.zero_optimization

    @property
    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self.resolved.zero_optimization.stage

    @property
    def zero_enabled(self) -> bool:
        """Whether the stage is above 0."""
        return self.zero_optimization_stage > 0

    @property
    def float16_config(self) -> Fp16:
        """The `fp16` section."""
        return self.resolved.fp16

    @property
    def bfloat16_config(self) -> Bf16:
        """The `bf16` section."""
        return self.resolved.bf16

    def print_user_config(self) -> str:
        """The user's config as JSON text, large numbers in scientific notation."""
        return json.dumps(dict(self._param_dict), sort_keys=True, indent=4, cls=ScientificNotationEncoder)

    def __str__(self) -> str:
        return self.resolved.explain()


def _data_parallel_ranks(mpu: Any, mesh_device: Any, raw: Mapping[str, Any]) -> int:
    world = (
        dist.get_world_size()
        if dist.is_available() and dist.is_initialized()
        else int(os.environ.get("WORLD_SIZE", "1"))
    )
    if mpu is not None:
        if hasattr(mpu, "get_data_parallel_world_size"):
            return int(mpu.get_data_parallel_world_size())
        return _divided(world, int(mpu.get_sequence_parallel_world_size()))
    if mesh_device is not None:
        return int(
            mesh_device.get_group("data_parallel").size() if hasattr(mesh_device, "get_group") else mesh_device.size()
        )
    shared = raw.get("sequence_parallel_size")
    return _divided(world, shared) if isinstance(shared, int) and shared > 1 else world


def _divided(world: int, ranks_per_sequence: int) -> int:
    if world % ranks_per_sequence:
        raise DeepSpeedConfigError(
            f"{world} ranks cannot be divided into sequence-parallel groups of {ranks_per_sequence}"
        )
    return world // ranks_per_sequence


class DeepSpeedConfigWriter:
    """Collects config keys and writes them as a JSON file."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = data if data is not None else {}

    def add_config(self, key: str, value: Any) -> None:
        """Set a top-level key."""
        self.data[key] = value

    def load_config(self, filename: str | os.PathLike[str]) -> None:
        """Replace the content by that of a file. DeepSpeedConfigError for a bad file or repeated keys."""
        self.data = dict(load_config(Path(filename)).raw)

    def write_config(self, filename: str | os.PathLike[str]) -> None:
        """Write the content."""
        Path(filename).write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")


explain_absent(__name__)
