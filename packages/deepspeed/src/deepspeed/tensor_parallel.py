"""Tensor parallelism in training: what of a model each rank holds is ds_inference's business, here it meets the engine.

`tp_model_init` records on a model that it is to be split; `deepspeed.initialize` splits it, there or because the
config's `tensor_parallel` section says so. The ranks are a grid: tensor-parallel groups of neighbouring ranks, which
hold one model together and are given the same batch; and data-parallel groups of the ranks that hold the same part,
over which ds_zero reduces gradients at any stage. What the parts of a model do together at the boundary (the norm, a
skipped step) is ds_zero's `ModelPart`.

Invariants: a model is split before its optimizer is made, and keeps its parameter objects, so an optimizer that exists
holds the parts; every element counts once in the norm; the ranks of a tensor-parallel group compare their batches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
import ds_zero
from deepspeed.config import ResolvedConfig
from deepspeed.config.source import choose_config, load_config
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError
from ds_inference import AppliedPlan, Rule, apply_tensor_parallel, plan_model

__all__ = [
    "TensorParallelGrid",
    "TensorRequest",
    "applied_to",
    "grid_of",
    "model_part",
    "requested",
    "set_autotp_mode",
    "split_model",
    "tp_model_init",
    "without_rank_count",
]

_RECORD = "_deepspeed_tensor_parallel"
_WHOLE_MATRIX_OPTIMIZERS = ("lamb", "muon", "adafactor")
_STYLES = {"column": "column", "row": "row", "skip": "replicated"}


def set_autotp_mode(training: bool = False) -> None:
    """Accepted for upstream's scripts and without effect: `initialize` trains, `init_inference` does not."""


@dataclass(frozen=True)
class TensorRequest:
    """What the program and the config ask for, before the config is resolved. size 1: no tensor parallelism."""

    size: int = 1
    group: Any = None
    dtype: torch.dtype | None = None
    recorded: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """For `resolve`, which compares them with the config."""
        return {"tensor_parallel.autotp_size": self.size} if self.recorded and self.size > 1 else {}


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: torch.dtype, config: Any = None, *, tp_group: Any = None
) -> nn.Module:
    """Record that `deepspeed.initialize` is to split a model over `tp_size` ranks; the same model comes back.

    Args:
        tp_size: ranks that hold one model together: neighbours, unless `tp_group` is given.
        dtype: the dtype that the config trains in.
        config: the config that `initialize` will get; only its `tensor_parallel.autotp_size` is looked at.
        tp_group: this rank's tensor-parallel group; not together with `initialize(mpu=...)`.
    Raises:
        DeepSpeedConfigError: tp_size is no positive number, or dtype no dtype. ConfigConflictError: config says else.
    """
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        raise DeepSpeedConfigError(f"tp_model_init: tp_size is {tp_size!r}; expected a number of ranks of at least 1")
    if not isinstance(dtype, torch.dtype):
        raise DeepSpeedConfigError(f"tp_model_init: dtype is {dtype!r}; expected a torch.dtype, such as torch.bfloat16")
    if config is not None:
        said = _size_of(load_config(config).raw)
        if said not in (0, 1, tp_size):
            raise ConfigConflictError(
                f"tp_model_init: tp_size is {tp_size}, but its config's tensor_parallel.autotp_size is {said}; make"
                " them equal"
            )
    if tp_group is not None and ds_comm.get_world_size(tp_group) != tp_size:
        raise ConfigConflictError(
            f"tp_model_init: tp_size is {tp_size}, but tp_group has {ds_comm.get_world_size(tp_group)} ranks"
        )
    model.__dict__[_RECORD] = TensorRequest(tp_size, tp_group, dtype, recorded=True)
    return model


def requested(model: nn.Module, config: Any, args: Any, config_params: Any) -> TensorRequest:
    """What `tp_model_init` recorded, else what the config says."""
    found = model.__dict__.get(_RECORD)
    if isinstance(found, TensorRequest):
        return found
    if config is None and config_params is None and getattr(args, "deepspeed_config", None) is None:
        return TensorRequest()
    raw = load_config(*choose_config(config, args, config_params)).raw
    section = _section(raw)
    inner = section.get("tensor_parallel", section.get("tp")) or {}
    return TensorRequest(max(1, _size_of(raw)), inner.get("tp_group") if isinstance(inner, Mapping) else None)


def _section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    section = raw.get("tensor_parallel") or {}
    return section if isinstance(section, Mapping) else {}


def _size_of(raw: Mapping[str, Any]) -> int:
    """Ranks per group by a raw config; what is no number is left to the config's own checks."""
    section = _section(raw)
    inner = section.get("tensor_parallel", section.get("tp")) or {}
    sizes = [section.get("autotp_size", 0), inner.get("tp_size", 1) if isinstance(inner, Mapping) else 1]
    given = {size for size in sizes if isinstance(size, int) and size > 1}
    if len(given) > 1:
        raise ConfigConflictError(
            f"tensor_parallel.autotp_size is {sizes[0]}, tensor_parallel.tensor_parallel.tp_size {sizes[1]}; give one"
        )
    return given.pop() if given else 0


def without_rank_count(raw: Mapping[str, Any], size: int) -> Mapping[str, Any] | None:
    """The config without its train_batch_size where that counts the batch of every rank, as Hugging Face's trainers do.

    The ranks of a tensor-parallel group share one batch, so the number is derived instead; None: it does not.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (raw.get(key) for key in keys)
    if not all(isinstance(value, int) for value in (total, micro, steps)):
        return None
    world = ds_comm.get_world_size()
    if size == 1 or total != micro * steps * world:  # type: ignore[operator]
        return None
    return {key: value for key, value in raw.items() if key != keys[0]}


# -- the ranks ----------------------------------------------------------------------------------------------------


class TensorParallelGrid:
    """An mpu: neighbouring ranks share a model, ranks with the same place in it share the data. Collective to make."""

    def __init__(self, size: int, tensor_group: Any = None) -> None:
        """`tensor_group`: this rank's tensor-parallel group, if it exists already."""
        world, rank = ds_comm.get_world_size(), ds_comm.get_rank()
        if world % size:
            raise ConfigConflictError(
                f"{world} ranks cannot be tensor-parallel groups of {size}; start a multiple of {size} ranks, or change"
                " tensor_parallel.autotp_size"
            )
        own = [] if tensor_group is None else list(ds_comm.get_all_ranks_from_group(tensor_group))
        told: list[Any] = [None] * world
        ds_comm.all_gather_object(told, own, label="tensor-parallel groups")
        if any(told):
            members = sorted({tuple(ranks) for ranks in told})
            if sorted(r for ranks in members for r in ranks) != list(range(world)):
                raise ConfigConflictError(f"the tensor-parallel groups {members} are not every rank exactly once")
        else:
            members = [tuple(range(first, first + size)) for first in range(0, world, size)]
        self.tensor_group, self.data_group = tensor_group, None
        for ranks in members if tensor_group is None else ():
            group = ds_comm.new_group(list(ranks))
            self.tensor_group = group if rank in ranks else self.tensor_group
        for place in range(size):
            peers = [ranks[place] for ranks in members]
            group = ds_comm.new_group(peers)
            self.data_group = group if rank in peers else self.data_group

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        return ds_comm.get_world_size(self.data_group)

    def get_data_parallel_rank(self) -> int:
        return ds_comm.get_rank(self.data_group)

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    def get_model_parallel_world_size(self) -> int:
        return ds_comm.get_world_size(self.tensor_group)

    def get_model_parallel_rank(self) -> int:
        return ds_comm.get_rank(self.tensor_group)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def grid_of(request: TensorRequest, mpu: Any) -> Any:
    """The mpu of a tensor-parallel model: the given one if it knows such groups, else a new grid; collective."""
    if mpu is None:
        return TensorParallelGrid(request.size, request.group)
    if request.group is not None:
        raise ConfigConflictError("both tp_group and initialize(mpu=...) say which ranks share a model; give one")
    size = getattr(mpu, "get_tensor_model_parallel_world_size", getattr(mpu, "get_model_parallel_world_size", None))
    if size is None or int(size()) != request.size:
        raise ConfigConflictError(
            f"tensor_parallel.autotp_size is {request.size}, but mpu knows "
            f"{'no' if size is None else int(size())} model-parallel ranks; leave out mpu, or make them equal"
        )
    return mpu


# -- the model ----------------------------------------------------------------------------------------------------


def applied_to(model: nn.Module) -> AppliedPlan | None:
    """What `split_model` did to a model; None for one that is whole."""
    found = model.__dict__.get("tensor_parallel")
    return found if isinstance(found, AppliedPlan) and found.size > 1 else None


def split_model(model: nn.Module, request: TensorRequest, config: ResolvedConfig, mpu: Any, optimizer: Any) -> None:
    """Split a model over the tensor-parallel group of `mpu` as the config says; collective.

    Raises:
        ModelError: it cannot be split, and why. ConfigConflictError: dtype, optimizer or zero.Init do not go with it.
    """
    _check(model, request, config, optimizer)
    group = getattr(mpu, "get_tensor_model_parallel_group", getattr(mpu, "get_model_parallel_group", None))
    assert group is not None  # grid_of has asked for its size
    settings = config.tensor_parallel
    plan = plan_model(
        model,
        request.size,
        rules=list(_rules(model, settings)),
        grain=settings.tensor_parallel.tp_grain_size,
        shard_vocabulary=settings.vocab_parallel_lm_head is not False,
        training=True,
    )
    applied = apply_tensor_parallel(model, plan, group=group())
    model.register_forward_pre_hook(SameBatch(applied.communicator), with_kwargs=True)


def model_part(model: nn.Module) -> ds_zero.ModelPart | None:
    """What ds_zero must know of a rank's part of a model."""
    applied = applied_to(model)
    return None if applied is None else ds_zero.ModelPart(applied.communicator, applied.duplicates())


def _check(model: nn.Module, request: TensorRequest, config: ResolvedConfig, optimizer: Any) -> None:
    trained = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.model_dtype]
    said = config.tensor_parallel.dtype
    if request.dtype not in (None, trained) or said not in (None, config.model_dtype):
        raise ConfigConflictError(
            f"tensor parallelism is asked for in {request.dtype or said}, but the config ({config.origin}) trains in "
            f"{trained}; make them equal (bf16.enabled, fp16.enabled)"
        )
    named = config.optimizer.type if config.optimizer is not None and config.optimizer.type else ""
    names = {named.lower(), type(optimizer).__name__.lower()}
    if whole := [name for name in _WHOLE_MATRIX_OPTIMIZERS if any(name in one for one in names)]:
        raise ConfigConflictError(
            f"optimizer {whole[0]} needs whole matrices, of which a tensor-parallel rank has a part; use one that works"
            " element by element, such as AdamW"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigConflictError(
            "this model was built under zero.Init, so no rank has the tensors to split; build it without, or on the "
            "meta device"
        )


def _rules(model: nn.Module, settings: Any) -> Iterator[Rule]:
    """The config's own plan as rules; DeepSpeedConfigError for what it says that cannot be done."""
    for name in settings.injection_policy_tuple or ():
        for one in [name] if isinstance(name, str) else name:
            yield Rule(rf"(?:^|\.){re.escape(one)}$", "row")
    given = dict(settings.partition_config or {})
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for spec in given.get("layer_specs", ()):
        types = spec.get("model_types")
        if types is not None and model_type not in types:
            continue
        style = _STYLES.get(
            str(getattr(spec.get("partition_type"), "value", spec.get("partition_type", "column"))).lower()
        )
        if style is None or spec.get("gather_output") or spec.get("grad_allreduce"):
            raise DeepSpeedConfigError(
                f"tensor_parallel.partition_config.layer_specs: {spec!r}: expected partition_type column, row or skip, "
                "without gather_output and grad_allreduce, which follow from the plan here"
            )
        for pattern in spec.get("patterns", ()):
            name = pattern.removesuffix("$").removesuffix(r"\.weight")
            if given.get("strict_mode") and not _names_any(model, pattern):
                raise DeepSpeedConfigError(
                    f"tensor_parallel.partition_config: no parameter matches the pattern {pattern!r} (strict_mode)"
                )
            yield Rule(name + ("$" if name != pattern else ""), style, _unit(spec, style))  # type: ignore[arg-type]
    if given and not given.get("use_default_specs", True):
        yield Rule("", "replicated")


def _names_any(model: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, name) for name, _ in model.named_parameters())


def _unit(spec: Mapping[str, Any], style: str) -> Any:
    """What upstream's `shape` of a fused layer says: [2, -1] gate and up, [3, -1] or [[q, k, v], -1] a fused qkv."""
    shape = spec.get("shape")
    if not shape or style != "column":
        return ""
    first = len(shape[0]) if isinstance(shape[0], (list, tuple)) else shape[0]
    return {2: "pair", 3: "qkv"}.get(first, "")


class SameBatch:
    """A forward pre-hook for training: every rank of a tensor-parallel group must be given the same batch."""

    DIGESTED_NUMEL = 1 << 18
    """Elements of each tensor that are compared; shapes and dtypes always are."""

    def __init__(self, communicator: ds_comm.Communicator) -> None:
        self.communicator = communicator

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            digest = hashlib.blake2b(digest_size=16)
            for name, value in [*((str(at), value) for at, value in enumerate(args)), *sorted(kwargs.items())]:
                self._add(digest, name, value)
            self.communicator.agree(
                f"batch {digest.hexdigest()}", label="the batch, which every tensor-parallel rank must be given alike"
            )

    def _add(self, digest: Any, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            flat = value.detach().reshape(-1)[: self.DIGESTED_NUMEL].contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._add(digest, f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for at, item in enumerate(value):
                self._add(digest, f"{name}.{at}", item)
        elif isinstance(value, (str, int, float, bool, type(None))):
            digest.update(f"{name} {value!r}".encode())
