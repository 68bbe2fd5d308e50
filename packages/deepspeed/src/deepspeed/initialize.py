"""`deepspeed.initialize`: from what a script has (model, config, optimizer, data) to an engine.

Each step is one call, in this order: distributed -> config -> optimizer -> sharding and engine -> scheduler -> data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import ds_comm
import ds_comm.device
from deepspeed.config import ResolvedConfig, resolve
from deepspeed.config.source import choose_config, load_config
from deepspeed.engine import DeepSpeedEngine
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.lr_schedules import make_schedule
from deepspeed.optimizers import build_optimizer
from deepspeed.pipeline_engine import PipelineEngine
from deepspeed.sequence.ranks import DataRanks, data_ranks, is_model_parallel, requested_grid
from deepspeed.settings import apply_settings
from deepspeed.tensor_parallel import applied_to, grid_of, requested, split_model, without_rank_count
from deepspeed.utils import groups
from deepspeed.utils.logging import log_dist
from ds_pipe import PipelineModule, PipelineParallelGrid

__all__ = ["add_config_arguments", "initialize"]

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Make a training engine of a model. Collective: call it on every rank alike.

    Args:
        args: parsed command line; `args.deepspeed_config` may name the config, `args.device_rank` the device.
        model: any torch module; may have been built under `deepspeed.zero.Init`. A `PipelineModule` gives a
            `PipelineEngine`.
        optimizer: a torch optimizer, or a function of the parameters that makes one; else the config's section.
        model_parameters: parameters or param groups for an optimizer made from the config (default: all trainable).
        training_data: a dataset, for which a loader is made.
        lr_scheduler: a scheduler, or a function of the (unwrapped) optimizer that makes one; else the config's.
        mpu: object with `get_data_parallel_group()` and its kin, when ranks share a model in other ways as well.
        mesh_param: (data-parallel ranks, ranks that share a sequence); neighbours share one.
        dist_init_required: False requires that torch.distributed is initialised already.
        config, config_params: dict, path of a JSON file, or base64 JSON.
    Returns:
        (engine, optimizer, dataloader, lr_scheduler); what there is none of is None.
    Raises:
        DeepSpeedConfigError: a bad or missing config. ValueError: no model.
        LayoutError: an optimizer over parameters that are not the model's.
    """
    if model is None:
        raise DeepSpeedConfigError("deepspeed.initialize needs a model: pass model=<torch.nn.Module>")
    _init_distributed(distributed_port, dist_init_required)
    engine_class: type[DeepSpeedEngine] = DeepSpeedEngine
    if isinstance(model, PipelineModule):
        engine_class, mpu = PipelineEngine, _grid(model, mpu)
    tensor = requested(model, config, args, config_params)
    if tensor.size > 1:
        _check_splittable(model)
        mpu = grid_of(tensor, mpu)
        config, args, config_params = _batch_of_group(tensor.size, config, args, config_params)
    mpu, ranks = _ranks(mpu, mesh_param, config, args, config_params)
    resolved = resolve(
        config,
        dp_world_size=ranks.size,
        device_type=ds_comm.device.device_type(),
        args=args,
        config_params=config_params,
        arguments=tensor.arguments,
    )
    _check_precision(resolved)
    if resolved.hybrid_engine.enabled:
        engine_class = _hybrid_engine(model)
    if tensor.size > 1:
        split_model(model, tensor, resolved, mpu, optimizer)
    apply_settings(resolved, mpu if is_model_parallel(mpu) else None)
    _make_expert_groups(model, resolved)
    basic = _basic_optimizer(resolved, optimizer, model_parameters, model)
    device_rank = getattr(args, "device_rank", None)
    engine = engine_class(
        model,
        resolved,
        optimizer=basic,
        group=ranks.group,
        ranks=ranks,
        mpu=mpu,
        collate_fn=collate_fn,
        device_index=device_rank if device_rank is not None and device_rank >= 0 else None,
        client_optimizer=optimizer,
    )
    engine.lr_scheduler = _scheduler(resolved, lr_scheduler, engine)
    engine.client_lr_scheduler = lr_scheduler
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _batch_of_group(size: int, config: Any, args: Any, config_params: Any) -> tuple[Any, Any, Any]:
    """The three with a batch size that counts a tensor-parallel group's batch once."""
    counted = without_rank_count(load_config(*choose_config(config, args, config_params)).raw, size)
    if counted is None:
        return config, args, config_params
    log_dist("train_batch_size counts every tensor-parallel rank's batch; they share one, so it is derived", ranks=[0])
    return counted, None, None


def _ranks(mpu: Any, mesh_param: Any, config: Any, args: Any, config_params: Any) -> tuple[Any, DataRanks]:
    """The mpu, or the grid that `mesh_param` or the config asks for, and this rank's place among the data."""
    given = (config, config_params, getattr(args, "deepspeed_config", None))
    raw = {} if all(one is None for one in given) else load_config(*choose_config(config, args, config_params)).raw
    grid = requested_grid(mpu, mesh_param, raw)
    if grid is not None:
        mpu, groups.mesh_device = grid, grid.mesh
    if mpu is None:
        return None, data_ranks(None, None)
    groups.mpu = mpu
    return mpu, data_ranks(mpu, groups._get_data_parallel_group())


def _check_splittable(model: nn.Module) -> None:
    """Refuse what tensor parallelism does not go with, before anything is made."""
    if isinstance(model, PipelineModule):
        raise DeepSpeedConfigError(
            "tensor_parallel inside a pipeline stage is not supported yet; set tensor_parallel.autotp_size to 0, or"
            " give the model itself instead of a PipelineModule"
        )
    if applied_to(model) is not None:
        raise DeepSpeedConfigError("this model is split over tensor-parallel ranks already; build it anew")


def _hybrid_engine(model: nn.Module) -> type[DeepSpeedEngine]:
    """The engine that generates between steps; imported where it is used, as inference is not needed for training."""
    if isinstance(model, PipelineModule):
        raise DeepSpeedConfigError(
            "hybrid_engine.enabled with a PipelineModule: a stage has no generate; give the model itself and let"
            " zero_optimization.stage 3 shard it, or leave hybrid_engine out"
        )
    from deepspeed.hybrid import DeepSpeedHybridEngine

    return DeepSpeedHybridEngine


def _grid(model: PipelineModule, mpu: Any) -> PipelineParallelGrid:
    """The rank grid of a pipeline, which is its mpu."""
    if mpu is not None:
        raise DeepSpeedConfigError(
            "mpu was given with a PipelineModule, which has its own; leave it out, and give PipelineModule a topology"
        )
    return model.mpu()


def _make_expert_groups(model: nn.Module, config: ResolvedConfig) -> None:
    """The process groups of `deepspeed.moe`'s layers, or of any with that method; collective."""
    for module in model.modules():
        make = getattr(module, "set_deepspeed_parallelism", None)
        if callable(make):
            make(config.use_data_before_expert_parallelism)


def _init_distributed(port: int, required: bool | None) -> None:
    from deepspeed import comm

    comm.init_distributed(distributed_port=port, dist_init_required=required)


def _check_precision(config: ResolvedConfig) -> None:
    if config.fp16.enabled and not ds_comm.device.is_fp16_supported():
        raise DeepSpeedConfigError(
            f"fp16.enabled is true, but this {ds_comm.device.device_type()} does not support it; use bf16"
        )


def _basic_optimizer(
    config: ResolvedConfig,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    model: nn.Module,
) -> torch.optim.Optimizer | None:
    """The torch optimizer to wrap: the client's object, what the client's function makes, or the config's."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    parameters = (
        [p for p in model.parameters() if p.requires_grad] if model_parameters is None else list(model_parameters)
    )
    if not parameters and isinstance(model, PipelineModule):  # a stage without weights takes its part in each step
        parameters = [{"params": []}]
    if callable(optimizer):
        return optimizer(parameters)
    if optimizer is not None:
        raise DeepSpeedConfigError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer, a function that makes one,"
            " or None"
        )
    if config.optimizer is not None and parameters:
        return build_optimizer(config.optimizer, parameters, model)
    if config.zero_optimization.stage in (1, 2):
        raise DeepSpeedConfigError(
            f"zero_optimization.stage {config.zero_optimization.stage} shards the optimizer, and there is none: pass"
            ' optimizer=..., or give the config an "optimizer" section and trainable model_parameters'
        )
    return None


def _scheduler(config: ResolvedConfig, scheduler: Any, engine: DeepSpeedEngine) -> Any:
    if scheduler is not None:
        is_function = callable(scheduler) and not hasattr(scheduler, "step")
        return scheduler(engine.basic_optimizer) if is_function else scheduler
    if config.scheduler is None or engine.optimizer is None or config.scheduler.type is None:
        return None
    return make_schedule(config.scheduler.type, engine.optimizer, dict(config.scheduler.params))


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` (and upstream's deprecated spellings) to a parser."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true", help="enable DeepSpeed (read by the script)")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the DeepSpeed JSON configuration")
    group.add_argument("--deepscale", default=False, action="store_true", help="deprecated: use --deepspeed")
    group.add_argument("--deepscale_config", default=None, type=str, help="deprecated: use --deepspeed_config")
    return parser
