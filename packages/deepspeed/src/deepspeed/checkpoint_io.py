"""The engine's checkpoints: what of an engine is state, and how it goes in and out of ds_zero.checkpoint.

Saved besides weights and optimizer state: counters, scheduler, loss scaler, param-group settings, data cursor, each
rank's RNG states, the model's persistent buffers, and the client's state. Resuming at the same number of ranks is
exact; at another number RNG states stay as they are. Training goes on at the beginning of an accumulation: gradients
that have not been stepped with are no part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import ds_comm
import ds_zero
from deepspeed import _tensor_checkpoint as tensor_parts
from deepspeed.__about__ import __version__
from deepspeed.events import CallbackList, EngineView
from deepspeed.utils.logging import logger
from ds_inference import AppliedPlan
from ds_zero import checkpoint as store

__all__ = [
    "EngineState",
    "Scope",
    "consolidated_state_dict",
    "load",
    "load_module",
    "save",
    "save_16bit_model",
    "wait",
    "without_frozen",
]

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
IMPLEMENTATION = {"capturable", "differentiable", "foreach", "fused"}
"""Settings of a param group that say how, not what: they stay as the live optimizer has them."""

Tag = str | int | os.PathLike[str] | None


@dataclass(frozen=True)
class Scope:
    """The ranks that save and load one checkpoint together, and the model that they hold together.

    Attributes:
        group: those ranks (None: the world). shard_map: of the whole model.
        layout: how many ranks each axis has ("pipe", "data"); random numbers are resumed at the same only.
        parts: the group along which the model lies in parts (None: every data-parallel rank knows all of its names).
        stores_buffers: whether this rank saves its buffers; None: the first rank does.
        tensor: how the model lies in parts along a tensor-parallel group, each saved by itself; None: it does not.
    """

    group: Any
    shard_map: ds_zero.ShardMap
    layout: dict[str, int]
    parts: Any = None
    stores_buffers: bool | None = None
    tensor: AppliedPlan | None = None


class EngineState(EngineView, Protocol):
    """The part of an engine that a checkpoint holds. `pending_save` is the save that is not durable yet."""

    micro_steps: int
    mp_world_size: int
    module: nn.Module
    sharded: ds_zero.ShardedModel
    lr_scheduler: Any
    training_dataloader: Any
    data_parallel_group: Any
    callbacks: CallbackList
    pending_save: Any

    @property
    def checkpoint_scope(self) -> Scope: ...

    def gradient_accumulation_steps(self) -> int: ...

    def zero_optimization_stage(self) -> int: ...

    def zero_gather_16bit_weights_on_model_save(self) -> bool: ...

    def zero_load_from_fp32_weights(self) -> bool: ...


# -- save ---------------------------------------------------------------------------------------------------------


def save(
    engine: EngineState,
    directory: str | os.PathLike[str],
    tag: Tag,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See DeepSpeedEngine.save_checkpoint. ValueError for an empty directory."""
    if not str(directory):
        raise ValueError("save_checkpoint needs a directory, got an empty name")
    _check_whole(engine)
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    optimizer = engine.optimizer
    training = isinstance(optimizer, ds_zero.ZeroOptimizer)
    if training and optimizer.has_gradients():
        logger.warning("checkpoint %s inside an accumulation: gradients since the last step are not part of it", tag)
    segments = optimizer.export_state() if training else engine.sharded.parameter_segments()
    scope = engine.checkpoint_scope
    place, name = os.fspath(directory), tag
    if scope.tensor is not None:
        tensor_parts.agree_on_tag(scope.tensor, tag)
        place, name = os.path.join(place, tag), tensor_parts.folder_of(scope.tensor)
    begin = functools.partial(
        store.save,
        place,
        name,
        segments,
        shard_map=scope.shard_map,
        extra=_extra(engine, client_state),
        rank_extra={"rng": _rng_state()},
        buffers=_buffers(engine.module),
        stores_buffers=scope.stores_buffers,
        duplicates=engine.sharded.duplicate_names if scope.tensor is None else frozenset(),
        group=scope.group,
        save_latest=save_latest and scope.tensor is None,
        exclude_frozen=exclude_frozen,
        gate=optimizer.gate if training else None,
    )
    if scope.tensor is None:
        engine.pending_save = begin()
        # Clients look for the tag's folder as soon as this returns (transformers, for the best model): it is there,
        # empty, until the finished one takes its place.
        with contextlib.suppress(OSError):
            Path(place, name).mkdir(exist_ok=True)
    else:  # `latest` may only move when all parts are there
        engine.pending_save = None
        first = scope.tensor.rank == 0 and ds_comm.get_rank(scope.group) == 0
        tensor_parts.finish_save(scope.tensor, begin, directory, tag, save_latest and first)
    engine.callbacks.on_save(engine, str(directory), tag)
    return True


def _check_whole(engine: EngineState) -> None:
    """Ranks that share the model in other ways than data parallelism would overwrite each other's files."""
    if engine.mp_world_size > 1 and engine.checkpoint_scope.tensor is None:
        raise ds_zero.CheckpointError(
            f"checkpoints of a model that {engine.mp_world_size} model-parallel ranks share are not supported yet; save"
            " each part's module_state_dict() under a name of its own"
        )


def wait(engine: EngineState) -> None:
    """Wait for the engine's last save."""
    pending, engine.pending_save = engine.pending_save, None
    if pending is None:
        return
    try:
        pending.wait()
    except Exception:
        with contextlib.suppress(OSError):  # not there, or holds an earlier save of this tag
            pending.path.rmdir()
        raise


def _extra(engine: EngineState, client_state: dict[str, Any]) -> dict[str, Any]:
    optimizer = engine.optimizer
    extra: dict[str, Any] = {
        "client_state": client_state,
        "ds_version": __version__,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "zero_stage": engine.zero_optimization_stage(),
        "layout": engine.checkpoint_scope.layout,
    }
    if engine.lr_scheduler is not None:
        extra["lr_scheduler"] = _plain(engine.lr_scheduler.state_dict())
    if isinstance(optimizer, ds_zero.ZeroOptimizer):
        extra["loss_scaler"] = optimizer.scaler.state_dict()
        extra["param_groups"] = [
            _plain({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups
        ]
    cursor = getattr(engine.training_dataloader, "state_dict", None)
    if cursor is not None:
        extra["data"] = cursor()
    return extra


def _plain(value: Any) -> Any:
    """The same without functions (those of torch's schedulers), which cannot be stored; loading keeps the live ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value if not callable(item)]
    return value


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {
        name: value
        for name, value in module.state_dict().items()
        if name not in parameters and isinstance(value, Tensor)
    }


def _rng_state() -> dict[str, Any]:
    version, keys, position = random.getstate()[0], random.getstate()[1], random.getstate()[2]
    kind, words, index, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "keys": list(keys), "gauss": position},
        "numpy": {
            "kind": str(kind),
            "words": torch.from_numpy(np.asarray(words).astype(np.int64)),
            "index": int(index),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].to(torch.uint8))
    python = state["python"]
    random.setstate((python["version"], tuple(python["keys"]), python["gauss"]))
    words = state["numpy"]
    np.random.set_state(
        (words["kind"], words["words"].numpy().astype(np.uint32), words["index"], words["has_gauss"], words["gauss"])
    )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# -- load ---------------------------------------------------------------------------------------------------------


def load(
    engine: EngineState,
    directory: str | os.PathLike[str],
    tag: Tag,
    *,
    strict: bool,
    optimizer_states: bool,
    scheduler_states: bool,
    module_only: bool,
    custom_load_fn: Callable[..., Any] | None,
    allow_pickle: bool | None,
) -> tuple[str | None, dict[str, Any] | None]:
    """See DeepSpeedEngine.load_checkpoint."""
    _check_whole(engine)
    tag = None if tag is None else str(tag)
    saved_to, scope = directory, engine.checkpoint_scope
    if scope.tensor is not None:
        if custom_load_fn is not None:
            raise ds_zero.CheckpointError(
                "custom_load_fn takes the whole model's state, of which each tensor-parallel rank loads a part; use"
                " load_module_state_dict with the whole state dict"
            )
        found = tensor_parts.place_of_tag(scope.tensor, directory, tag)
        if found is None:
            logger.warning("no file 'latest' in %s and no tag given; nothing is loaded", directory)
            return None, None
        directory, tag, called = found
    optimizer = engine.optimizer
    training = isinstance(optimizer, ds_zero.ZeroOptimizer)
    targets = (
        optimizer.import_targets(_state_keys(engine, directory, tag, allow_pickle) if optimizer_states else {})
        if training
        else engine.sharded.parameter_segments(shard_only=False)
    )
    loaded = store.load(
        directory,
        targets,
        shard_map=scope.shard_map,
        tag=tag,
        group=scope.group,
        weights_only=not optimizer_states or not training,
        strict=strict and custom_load_fn is None,
        allow_pickle=allow_pickle,
    )
    if loaded is None:
        logger.warning("no file 'latest' in %s and no tag given; nothing is loaded", directory)
        return None, None
    if training:
        optimizer.finish_import(targets)
        if not engine.zero_load_from_fp32_weights():
            optimizer.refresh_master()
    else:
        engine.sharded.settle()
    _load_buffers(engine.module, loaded.buffers)
    if custom_load_fn is not None:
        load_module(engine, store.full_state_dict(directory, loaded.tag, dtype=None), strict, custom_load_fn)
    extra = loaded.extra
    if training and optimizer_states:
        _load_optimizer_settings(optimizer, extra)
    if scheduler_states and engine.lr_scheduler is not None and "lr_scheduler" in extra:
        engine.lr_scheduler.load_state_dict(extra["lr_scheduler"])
    if not module_only:
        _load_progress(engine, loaded)
    engine.callbacks.on_load(engine, str(saved_to), loaded.tag if scope.tensor is None else called)
    state = {**extra.get("counters", {}), "ds_version": extra.get("ds_version"), **extra.get("client_state", {})}
    return str(loaded.path), state


def _state_keys(
    engine: EngineState, directory: str | os.PathLike[str], tag: str | None, allow_pickle: bool | None
) -> dict[str, torch.dtype]:
    """States that the optimizer must have memory for before the load (collective: rank 0 moves `latest` last)."""
    failure: Exception | None = None
    try:
        wait(engine)
        store.wait_for_pending_saves()  # of other engines
    except ds_zero.CheckpointError as error:  # maybe this rank's alone: meet the others before raising it
        failure = error
    ds_comm.barrier(engine.checkpoint_scope.group, label=f"load_checkpoint {tag}: the last save is done")
    if failure is not None:
        logger.error("an earlier save failed: %s", failure)
    try:
        return store.state_keys(directory, tag, allow_pickle=allow_pickle)
    except ds_zero.CheckpointError:  # the load itself says so, on all ranks
        return {}


def _load_progress(engine: EngineState, loaded: store.LoadedCheckpoint) -> None:
    """Counters, random numbers and data cursor."""
    for name, value in loaded.extra.get("counters", {}).items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scope = engine.checkpoint_scope
    layout = loaded.extra.get("layout", {"pipe": 1, "data": loaded.world_size})
    if loaded.rank_extra is not None and layout == scope.layout:
        _set_rng_state(loaded.rank_extra["rng"])
    elif ds_comm.get_rank(scope.group) == 0:
        logger.warning(
            "%s was saved by %d ranks (%s): random number states are not restored",
            loaded.path,
            loaded.world_size,
            ", ".join(f"{axis} {size}" for axis, size in layout.items()),
        )
    cursor = getattr(engine.training_dataloader, "load_state_dict", None)
    if cursor is not None and "data" in loaded.extra:
        cursor(loaded.extra["data"])


def _load_optimizer_settings(optimizer: ds_zero.ZeroOptimizer, extra: dict[str, Any]) -> None:
    if "loss_scaler" in extra:
        optimizer.scaler.load_state_dict(extra["loss_scaler"])
    saved = extra.get("param_groups", [])
    if len(saved) != len(optimizer.param_groups):
        logger.warning(
            "the checkpoint has %d param groups, the optimizer %d: learning rates and the like stay as they are",
            len(saved),
            len(optimizer.param_groups),
        )
        return
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if key not in IMPLEMENTATION:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _load_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    live = _buffers(module)
    with torch.no_grad():
        for name, value in buffers.items():
            if name in live:
                live[name].copy_(value)


# -- whole models -------------------------------------------------------------------------------------------------


def without_frozen(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the parameters that do not require a gradient."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


@torch.no_grad()
def consolidated_state_dict(engine: EngineState, exclude_frozen: bool = False) -> dict[str, Tensor] | None:
    """Full tensors on CPU on rank 0 (ties share one tensor), None elsewhere; one parameter is gathered at a time."""
    mine = ds_comm.get_rank(engine.data_parallel_group) == 0
    whole: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if exclude_frozen and not parameter.requires_grad:
            continue
        if id(parameter) not in whole:
            with ds_zero.GatheredParameters(parameter):
                whole[id(parameter)] = parameter.detach().cpu().clone() if mine else torch.empty(0)
        state[name] = whole[id(parameter)]
    if not mine:
        return None
    state.update({name: value.detach().cpu().clone() for name, value in _buffers(engine.module).items()})
    state = {name: state[name] for name in engine.module.state_dict() if name in state}
    tensor = engine.checkpoint_scope.tensor
    if tensor is not None:
        return tensor_parts.joined_state(tensor, state)
    parts = engine.checkpoint_scope.parts
    return state if parts is None else _join_parts(state, parts)


def _join_parts(state: dict[str, Tensor], group: Any) -> dict[str, Tensor] | None:
    """The state dicts of all ranks of `group` in one on its first rank, None elsewhere; one tensor travels at a time.

    Of a name that several have, the first one's counts.
    """
    rank, size = ds_comm.get_rank(group), ds_comm.get_world_size(group)
    listed: list[Any] = [None] * size
    ds_comm.all_gather_object(listed, [(k, tuple(v.shape), v.dtype) for k, v in state.items()], group=group)
    whole = dict(state)
    for source in range(1, size):
        for name, shape, dtype in listed[source]:
            if rank == source:
                ds_comm.send(state[name].contiguous(), group=group, group_dst=0, label=f"state dict: {name}")
            elif rank == 0:
                found = torch.empty(shape, dtype=dtype)
                ds_comm.recv(found, group=group, group_src=source, label=f"state dict: {name}")
                whole.setdefault(name, found)
    return whole if rank == 0 else None


def save_16bit_model(
    engine: EngineState, directory: str | os.PathLike[str], filename: str, exclude_frozen: bool
) -> bool:
    """See DeepSpeedEngine.save_16bit_model. False at stage 3 without the gather key, as upstream."""
    if engine.zero_optimization_stage() == 3 and not engine.zero_gather_16bit_weights_on_model_save():
        logger.warning(
            "%s was not saved: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true", filename
        )
        return False
    state = consolidated_state_dict(engine, exclude_frozen)
    error = [None if state is None else _write_model(state, Path(directory) / filename)]
    scope = engine.checkpoint_scope
    if scope.tensor is not None:
        group = scope.tensor.communicator.group
        ds_comm.broadcast_object_list(error, src=ds_comm.get_all_ranks_from_group(group)[0], group=group)
    ds_comm.broadcast_object_list(error, src=_first_rank(engine), group=scope.group)
    if error[0] is not None:
        raise ds_zero.CheckpointError(f"{filename} was not written to {directory}: {error[0]}")
    return True


def _first_rank(engine: EngineState) -> int:
    """Global rank of the one that writes."""
    return ds_comm.get_all_ranks_from_group(engine.checkpoint_scope.group)[0]


def _write_model(state: dict[str, Tensor], target: Path) -> str | None:
    """Write a state dict durably to one file; returns what went wrong."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            save_file(_untied(state), temporary, metadata={"format": "pt"})
        else:
            torch.save(state, temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        return str(error)
    return None


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: safetensors refuses shared memory, and loaders tie again by the config."""
    seen: set[int] = set()
    return {k: v for k, v in state.items() if not (v.data_ptr() in seen or seen.add(v.data_ptr()))}  # type: ignore[func-returns-value]


@torch.no_grad()
def load_module(
    engine: EngineState, state: dict[str, Any], strict: bool, custom_load_fn: Callable[..., Any] | None
) -> None:
    """Full tensors into parameters (and masters) and buffers; every rank passes the same (whole) model's."""
    module = engine.module
    if engine.checkpoint_scope.parts is not None:  # the state of the whole model is given, and this is a part of it
        own = module.state_dict()
        state = {name: value for name, value in state.items() if name in own}
    tensor = engine.checkpoint_scope.tensor
    if tensor is not None:
        state = tensor.cut_state_dict(state)
    with ds_zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        if custom_load_fn is not None:
            custom_load_fn(src=state, dst=module)
        else:
            module.load_state_dict(state, strict=strict)
    if isinstance(engine.optimizer, ds_zero.ZeroOptimizer):
        engine.optimizer.refresh_master()
