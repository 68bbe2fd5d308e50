"""From a model to its shard map, without ranks: what `shard()` does first, and all that a planner needs.

Blocks of the model (`blocks.find_blocks`) become units of a shard map; the config says which dtype and what stays
gathered, the stage what is sharded. Nothing is allocated and no tensor is read, so the model may be on `meta`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ds_zero._param import record_of
from ds_zero.blocks import Block
from ds_zero.config import ZeroConfig
from ds_zero.errors import LayoutError
from ds_zero.layout import FROZEN, ParamSpec, ShardMap, plan_shard_map
from ds_zero.part import ModelPart
from ds_zero.precision import DTYPES, dtype_name

__all__ = ["StageParts", "parameter_names", "plan_units"]


@dataclasses.dataclass(frozen=True)
class StageParts:
    """What of a unit is sharded. The number of the stage is not known beyond this."""

    state: bool
    """Masters, optimizer state, and reduced gradients (which exist only as the shard that updates the state)."""
    params: bool


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> all its names; ties are found by identity."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def plan_units(
    blocks: Sequence[Block],
    names: Mapping[nn.Parameter, list[str]],
    groups: Mapping[nn.Parameter, int],
    config: ZeroConfig,
    parts: StageParts,
    num_shards: int,
    part: ModelPart | None = None,
) -> ShardMap:
    """The shard map of a model's blocks.

    Args:
        names: of every parameter (`parameter_names`). groups: parameter -> optimizer group; without any, what
            requires a gradient counts as trainable.
        part: what the model is a part of; it may then have no parameters.
    Raises:
        LayoutError: a trained parameter is float64, or there is no parameter at all.
    """
    state_shards = num_shards if parts.state else 1
    if not blocks and part is not None:
        return ShardMap((), num_shards, state_shards)
    return plan_shard_map(
        [(block.name, [_spec(p, names[p], groups, config, part) for p in block.parameters]) for block in blocks],
        num_shards=num_shards,
        state_shards=state_shards,
        persistence_threshold=config.param_persistence_threshold if parts.params else 0,
        persistence_total=config.model_persistence_threshold // num_shards if parts.params else None,
    )


def _spec(
    parameter: nn.Parameter,
    names: list[str],
    groups: Mapping[nn.Parameter, int],
    config: ZeroConfig,
    part: ModelPart | None,
) -> ParamSpec:
    record = record_of(parameter)
    dtype = parameter.dtype
    if parameter.requires_grad and dtype == torch.float64 and config.dtype is None and groups:
        raise LayoutError(
            f"parameter {names[0]!r} is float64, but masters are fp32; set dtype='fp32' or call model.float() first"
        )
    if config.dtype is not None and dtype.is_floating_point:
        dtype = DTYPES[config.dtype]
    group = groups.get(parameter, FROZEN) if parameter.requires_grad else FROZEN
    return ParamSpec(
        names[0],
        tuple(record.shape if record is not None else parameter.shape),
        dtype_name(dtype),
        parameter.requires_grad and dtype.is_floating_point and (group != FROZEN or not groups),
        group,
        tuple(names[1:]),
        0 if part is None else part.lane_of(parameter),
    )
