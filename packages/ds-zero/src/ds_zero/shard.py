"""shard(): the public verb, and the only place where the number of a ZeRO stage means something.

stage 0   nothing is sharded (the one-shard layout)
stage 1   optimizer state       Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
stage 2   + gradients           Parameter Models"
stage 3   + parameters

Stages 1 and 2 are one layout here: gradients are reduced unit by unit as they come, so the full gradient that stage 1
is allowed to keep never exists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

import ds_comm
from ds_zero._flat import trim_heap
from ds_zero.blocks import find_blocks
from ds_zero.config import ZeroConfig
from ds_zero.errors import LayoutError
from ds_zero.optimizer import ZeroOptimizer, trainable_parameters
from ds_zero.part import ModelPart
from ds_zero.sharded import ShardedModel, StageParts, place_of

__all__ = ["shard", "sharded_of"]

logger = logging.getLogger(__name__)


def stage_parts(stage: int) -> StageParts:
    """What each stage shards."""
    return StageParts(state=stage >= 1, params=stage >= 3)


def shard(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    config: ZeroConfig | dict[str, Any] | None = None,
    group: Any = None,
    units: Iterable[str | type[nn.Module]] | None = None,
    part: ModelPart | None = None,
) -> tuple[nn.Module, ZeroOptimizer | None]:
    """Shard a model and its optimizer over the ranks of a group; collective, call it on every rank alike.

    The model object stays the same and is used as before. The returned optimizer replaces the given one: after any
    number of `loss.backward()` (or `optimizer.backward(loss)`), `optimizer.step()` updates the model with the mean
    gradient over ranks.

    Args:
        model: any torch module; its parameters may have been built under `Init`.
        optimizer: any elementwise torch optimizer over (some of) the model's parameters, not stepped yet; parameters
            that it does not hold are frozen. None: the model only runs forward.
        config: stage, precision, accumulation, clipping, bucket sizes.
        group: process group to shard over (None: the world; initialised here if need be).
        units: module names or classes to gather together, instead of the automatic choice of transformer blocks.
        part: what the model is a part of (a pipeline stage); it may then have nothing to train, or no parameters.
    Returns:
        (model, ZeroOptimizer or None)
    Raises:
        LayoutError: an optimizer parameter is not in the model, or is in two groups; unit names that match nothing.
    """
    settings = config if isinstance(config, ZeroConfig) else ZeroConfig(**(config or {}))
    if sharded_of(model) is not None:
        raise LayoutError("this model is sharded already; shard it once, or close() the first optimizer")
    if any(place_of(p) is not None for p in model.parameters()):
        raise LayoutError("the model shares parameters with another sharded model; shard the module that holds both")
    ds_comm.init_distributed()
    comm = ds_comm.communicator(group)
    groups = {} if optimizer is None else trainable_parameters(optimizer.param_groups)
    _check_known(model, optimizer, groups)
    late: list[ZeroOptimizer] = []

    def begin_forward() -> None:
        if late:
            late[0].end_backward()
        sharded.end_micro_batch()

    blocks = find_blocks(model, units)
    sharded = ShardedModel(model, blocks, groups, settings, stage_parts(settings.stage), comm, begin_forward, part)
    sharded.set_places()
    model.__dict__["_zero_sharded"] = sharded
    trim_heap()  # what the parameters had as tensors of their own
    if optimizer is None:
        return model, None
    if not sharded.trainable and part is None:
        raise LayoutError("the optimizer holds no parameter that requires a gradient; nothing would be trained")
    late.append(ZeroOptimizer(optimizer, sharded))
    model.__dict__["_zero_optimizer"] = late[0]
    return model, late[0]


def sharded_of(model: nn.Module) -> ShardedModel | None:
    """The ShardedModel of a model that `shard` has laid out; None for any other."""
    return model.__dict__.get("_zero_sharded")


def _check_known(model: nn.Module, optimizer: Optimizer | None, groups: dict[nn.Parameter, int]) -> None:
    if optimizer is None:
        return
    known = set(model.parameters())
    strange = [tuple(p.shape) for p in groups if p not in known]
    if strange:
        raise LayoutError(
            f"{len(strange)} parameters of {type(optimizer).__name__} are not in the model, first of shape"
            f" {strange[0]}; build the optimizer from this model's parameters()"
        )
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p not in groups]
    for name in idle:
        model.get_parameter(name).requires_grad_(False)
    if idle:
        logger.warning(
            "%d parameters that %s does not hold are frozen, first %s", len(idle), type(optimizer).__name__, idle[0]
        )
