"""A run, planned: memory by owner, traffic and checkpoint size of one rank of a data-parallel world.

    workload = Workload("llama", model_on_meta, run=lambda model, micro_batch: model(batch(micro_batch)).loss)
    plan = plan_run(workload, "ds.json", world=64, device="cuda")

The config is resolved as `initialize` would resolve it, the optimizer is built over the model's parameters (on `meta`,
so it holds nothing), and `ds_zero.forecast` runs one step on fake tensors. Nothing is started: no ranks, no device.

Invariant: every number comes from the objects that a run reads (shard map, buckets, gather hooks) or, for what the
optimizer keeps per element, from one step of that optimizer on a toy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.config import ResolvedConfig, resolve
from deepspeed.config.source import ConfigSource
from deepspeed.config.translate import zero_config
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.optimizers import build_optimizer
from ds_zero.cost import ITEMSIZE, MASTER_NBYTES
from ds_zero.forecast import Forecast, forecast
from ds_zero.layout import ShardMap

__all__ = ["Plan", "Workload", "plan_run"]

_CHUNK_NBYTES = 4 << 17
"""fp32 scratch of the fused update on a CPU with one thread; elsewhere a segment is updated at once."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be trained, without weights and without data."""

    name: str
    model: nn.Module
    """Best on the meta device: only shapes, dtypes and ties are read."""
    run: Callable[[nn.Module, int], Tensor]
    """(the model, samples per micro-batch) -> scalar loss; it makes its own inputs and looks at no values."""
    text: str = ""
    """One line on what a sample is, for the report."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One rank of a run. Sizes are in bytes."""

    workload: Workload
    config: ResolvedConfig
    device: str
    forecast: Forecast
    checkpoint_nbytes: int
    """Of a whole checkpoint: masters, optimizer states, frozen parameters, buffers."""
    weights_nbytes: int
    """Of the weights alone in the model's dtype, as `save_16bit_model` writes them."""
    notes: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """Data-parallel ranks."""
        return self.config.dp_world_size

    @property
    def peak_nbytes(self) -> int:
        """Most that one rank holds at a time."""
        return self.forecast.peak.total

    def fits(self, device_memory: int) -> bool:
        """Whether the peak is no more than `device_memory` bytes."""
        return self.peak_nbytes <= device_memory


def plan_run(workload: Workload, config: ConfigSource, *, world: int, device: str = "cpu") -> Plan:
    """Plan `workload` with `config` on `world` data-parallel ranks.

    Args:
        device: "cpu" (all ranks on one host, shared memory) or a kind of accelerator ("cuda").
    Raises:
        DeepSpeedConfigError: a config that `initialize` would refuse, or a split other than data-parallel.
    """
    resolved = resolve(config, dp_world_size=world, device_type=device)
    if resolved.tensor_parallel.autotp_size > 1:
        raise DeepSpeedConfigError(
            f"tensor_parallel.autotp_size is {resolved.tensor_parallel.autotp_size}: a plan knows data-parallel ranks"
            " only; plan the model of one tensor-parallel rank without that section"
        )
    if (resolved.sequence_parallel_size or 1) > 1:
        raise DeepSpeedConfigError(
            f"sequence_parallel_size is {resolved.sequence_parallel_size}: a plan knows data-parallel ranks only; leave"
            " the key out and plan the tokens that one rank has of each sequence"
        )
    model, settings, notes = workload.model, zero_config(resolved), []
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: dict[nn.Parameter, int] = {}
    states: dict[int, int] = {}
    fused = False
    if resolved.optimizer is None:
        notes.append("the config has no optimizer section; planned for AdamW")
        groups, states, fused = dict.fromkeys(trained, 0), {0: 2}, True
    elif trained:
        optimizer = build_optimizer(resolved.optimizer, trained, model)
        fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        groups = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        states = _states_per_element(resolved.optimizer, optimizer)
    micro_batch = resolved.train_micro_batch_size_per_gpu

    def run(fake: nn.Module) -> Tensor:
        with torch.autocast("cpu", enabled=resolved.torch_autocast.enabled, dtype=_autocast_dtype(resolved)):
            return workload.run(fake, micro_batch)

    kind = "local" if world == 1 else "shm" if device == "cpu" else "torch"
    found = forecast(
        model,
        run,
        config=settings,
        num_shards=world,
        kind=kind,
        num_states=states or 0,
        scratch_nbytes=_CHUNK_NBYTES if fused and device == "cpu" else 0,
        groups=groups,
    )
    if not (fused and device == "cpu"):
        found = _with_scratch(found, fused, settings.sub_group_size)
    return Plan(
        workload,
        resolved,
        device,
        found,
        _checkpoint_nbytes(found.shard_map, states, model),
        sum(unit.numel * ITEMSIZE[unit.dtype] for unit in found.shard_map.units),
        tuple(notes),
    )


def _autocast_dtype(config: ResolvedConfig) -> torch.dtype:
    return torch.float16 if config.torch_autocast.dtype in ("fp16", "float16") else torch.bfloat16


def _with_scratch(found: Forecast, fused: bool, sub_group_size: int) -> Forecast:
    """Add the fp32 gradients that an update works on: one unit's (fused), or a sub-group's."""
    shard_map = found.shard_map
    sizes = [b - a for u in shard_map.units if u.trainable for a, b in (shard_map.state_range(u, 0),)]
    numel = max(sizes, default=0) if fused else min(sum(sizes), max(sub_group_size, max(sizes, default=0)))
    step = found.highest["step"]
    held = {**step.held, "buffers": step.held["buffers"] + MASTER_NBYTES * numel}
    highest = {**found.highest, "step": dataclasses.replace(step, held=held)}
    peak = max(highest.values(), key=lambda moment: moment.total)
    return dataclasses.replace(found, highest=highest, peak=peak)


class _Toy(nn.Module):
    """One matrix and one vector: what an optimizer may treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


def _states_per_element(section: Any, optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Group -> tensors that the optimizer keeps per element, from one step of it on a toy."""
    toy = _Toy()
    twin = build_optimizer(section, list(toy.parameters()), toy)
    toy.layer(torch.ones(2, 8)).sum().backward()
    twin.step()
    kept: dict[bool, int] = {}
    for group in twin.param_groups:
        for parameter in group["params"]:
            state = twin.state[parameter]
            count = sum(1 for v in state.values() if isinstance(v, Tensor) and v.numel() == parameter.numel() > 1)
            kept[bool(group.get("use_muon"))] = count
    return {
        index: kept.get(bool(group.get("use_muon")), max(kept.values(), default=0))
        for index, group in enumerate(optimizer.param_groups)
    }


def _checkpoint_nbytes(shard_map: ShardMap, states: Mapping[int, int], model: nn.Module) -> int:
    saved: dict[int, int] = {
        id(b): b.numel() * b.element_size() for b in model.state_dict(keep_vars=True).values() if _is_buffer(b)
    }
    total = sum(saved.values())
    for unit in shard_map.units:
        for slot in unit.slots:
            each = MASTER_NBYTES * (1 + states[slot.group]) if unit.trainable else ITEMSIZE[unit.dtype]
            total += each * slot.numel
    return total


def _is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
