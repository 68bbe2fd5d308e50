"""Checkpoints written by upstream DeepSpeed 0.19 at ZeRO stages 1-3: weights, fp32 masters, optimizer state, step.

Layout on disk (facts; N data-parallel ranks):
    mp_rank_00_model_states.pt                            stages 0-2: `module`, names, shapes, counters, client state
    zero_pp_rank_<r>_mp_rank_00_model_states.pt           stage 3: the same with empty placeholders for parameters
    [bf16_|fp16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   rank r's flat fp32 partitions and optimizer state
Stages 1 and 2: each optimizer group is one flat vector cut into N consecutive partitions; `param_slice_mappings` says
which elements of rank r's partition belong to which parameter. Stage 3: each parameter is cut into N parts of
ceil(numel / N) elements, and rank r's parts follow one another in the order of `param_shapes`.

An `UpstreamCheckpoint` offers what `load` needs of a `Checkpoint`; tensors stay memory-mapped until they are copied.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_zero.checkpoint.format import dtype_name
from ds_zero.checkpoint.manifest import KeyRecord, Manifest, ParamRecord
from ds_zero.checkpoint.read import Want
from ds_zero.checkpoint.unpickle import Inert, check_allowed, load_inert
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN
from ds_zero.state import MASTER, PARAM

__all__ = ["UpstreamCheckpoint", "is_upstream"]

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_OWN_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info",
}  # fmt: skip


def is_upstream(path: Path) -> bool:
    """Whether a tag directory holds upstream's files."""
    return path.is_dir() and any(_MODEL.fullmatch(child.name) for child in path.iterdir())


@dataclasses.dataclass(frozen=True)
class _Fragment:
    """Elements `[start, start + numel)` of a flattened parameter."""

    start: int
    values: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


@dataclasses.dataclass
class _Param:
    shape: tuple[int, ...]
    group: int
    fragments: dict[str, list[_Fragment]] = dataclasses.field(default_factory=dict)
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, key: str, start: int, values: torch.Tensor) -> None:
        if values.numel():
            self.fragments.setdefault(key, []).append(_Fragment(start, values))


class UpstreamCheckpoint:
    """One tag directory of upstream, opened read-only."""

    def __init__(self, directory: Path, tag: str, allow_pickle: bool | None = None) -> None:
        """Raises CheckpointError without the opt-in, or when files are missing, damaged or tensor-parallel."""
        self.directory = directory
        self.tag = tag
        self.path = directory / tag
        check_allowed(self.path, allow_pickle)
        self._models = self._open(_MODEL)
        self._optims = [_as_dict(item, "optimizer_state_dict") for item in self._open(_OPTIM)]
        self._main = self._models[0]
        self.zero_stage = int(_plain_stage(self._optims[0]["zero_stage"])) if self._optims else 0
        self._params: dict[str, _Param] = {}
        if self.zero_stage == 3:
            self._read_stage_3()
        elif self._optims:
            self._read_stage_1_2()
        self._read_module()
        self.manifest = self._make_manifest()

    def _open(self, pattern: re.Pattern[str]) -> list[Any]:
        found: dict[int, Path] = {}
        for child in self.path.iterdir():
            match = pattern.fullmatch(child.name)
            if match is None:
                continue
            if int(match[2]) != 0:
                raise CheckpointError(
                    f"{child} belongs to a tensor-parallel model; expected one model-parallel rank (mp_rank_00)"
                )
            found[int(match[1] or 0)] = child
        lacking = set(range(len(found))) - set(found)
        if lacking:
            raise CheckpointError(f"{self.path} lacks the file of rank {min(lacking)} (it has ranks {sorted(found)})")
        return [load_inert(found[rank]) for rank in range(len(found))]

    def _check_count(self, expected: int) -> None:
        if len(self._optims) != expected:
            raise CheckpointError(
                f"{self.path} has {len(self._optims)} optim_states files; it was written by {expected} ranks, "
                "so some are missing"
            )

    def _read_stage_1_2(self) -> None:
        for group, shapes in enumerate(self._main["param_shapes"]):
            for name, shape in shapes.items():
                self._params[name] = _Param(tuple(shape), group)
        self._check_count(max(self._optims[0]["partition_count"]))
        position = dict.fromkeys(self._params, 0)
        for optim in self._optims:
            for group, master in enumerate(optim["single_partition_of_fp32_groups"]):
                state, scalars = _group_state(optim["base_optimizer_state"], group)
                streams = {MASTER: master, **state}
                for name, start, numel in self._slices(optim, group, position):
                    param = self._params[name]
                    for key, values in streams.items():
                        param.add(key, position[name], values.reshape(-1)[start : start + numel])
                    position[name] += numel
                    param.scalars.update(scalars)
        for name, param in self._params.items():
            if position[name] != math.prod(param.shape):
                raise CheckpointError(
                    f"{self.path}: parameter {name!r} has {position[name]} of {math.prod(param.shape)} elements"
                )

    def _slices(
        self, optim: Mapping[str, Any], group: int, position: Mapping[str, int]
    ) -> Iterator[tuple[str, int, int]]:
        """(parameter, first element in the partition, number of elements) of one rank's partition of a group."""
        mappings = optim.get("param_slice_mappings")
        if mappings is not None:
            for name, address in mappings[group].items():
                yield name, int(address.start), int(address.numel)
            return
        start, size = 0, optim["single_partition_of_fp32_groups"][group].numel()
        for name, shape in self._main["param_shapes"][group].items():
            numel = min(math.prod(shape) - position[name], size - start)
            if numel > 0:
                yield name, start, numel
                start += numel

    def _read_stage_3(self) -> None:
        self._check_count(int(self._optims[0]["partition_count"]))
        ranks = len(self._optims)
        for rank, optim in enumerate(self._optims):
            flats = optim["fp32_flat_groups"]
            index, offset = 0, 0
            for group, shapes in enumerate(self._main["param_shapes"]):
                for name, shape in shapes.items():
                    numel = math.prod(shape)
                    share = -(-numel // ranks)
                    while index < len(flats) and flats[index].numel() - offset < share:
                        index, offset = index + 1, 0  # the next sub-group
                    if index == len(flats):
                        raise CheckpointError(f"{self.path}: rank {rank}'s partition ends before parameter {name!r}")
                    param = self._params.setdefault(name, _Param(tuple(shape), group))
                    state, scalars = _group_state(optim["optimizer_state_dict"], index)
                    first = min(rank * share, numel)
                    count = min(share, numel - first)
                    for key, values in {MASTER: flats[index], **state}.items():
                        param.add(key, first, values.reshape(-1)[offset : offset + count])
                    param.scalars.update(scalars)
                    offset += share
        for name, shape in (self._main.get("frozen_param_shapes") or {}).items():
            self._params[name] = _Param(tuple(shape), FROZEN)
            share = -(-math.prod(shape) // ranks)
            for rank, model in enumerate(self._models):
                first = min(rank * share, math.prod(shape))
                values = model["frozen_param_fragments"][name].reshape(-1)[: math.prod(shape) - first]
                self._params[name].add(PARAM, first, values)

    def _read_module(self) -> None:
        """Whole tensors of `module`: buffers, and (below stage 3) parameters that no optimizer holds."""
        self.buffers: dict[str, torch.Tensor] = {}
        self._shared: dict[str, str] = dict(self._main.get("shared_params") or {})
        names = set(self._main.get("buffer_names") or ())
        for name, value in self._main["module"].items():
            if name in names:
                self.buffers[name] = value.clone()
            elif name not in self._params and name not in self._shared and isinstance(value, torch.Tensor):
                if self.zero_stage == 3:
                    continue  # an empty placeholder: a tie under its second name
                self._params[name] = _Param(tuple(value.shape), FROZEN)
                self._params[name].add(PARAM, 0, value.reshape(-1))

    def _make_manifest(self) -> Manifest:
        aliases: dict[str, list[str]] = {}
        for alias, name in self._shared.items():
            aliases.setdefault(name, []).append(alias)
        params: dict[str, ParamRecord] = {}
        for name, param in self._params.items():
            keys = {key: KeyRecord(dtype_name(parts[0].values.dtype), []) for key, parts in param.fragments.items()}
            other = tuple(aliases.get(name, ()))
            params[name] = ParamRecord(param.shape, "", param.group, other, keys, param.scalars)
        return Manifest(
            tag=self.tag,
            nonce="",
            ds_version=str(self._main.get("ds_version")),
            world_size=max(1, len(self._optims)),
            num_shards=max(1, len(self._optims)),
            state_shards=max(1, len(self._optims)),
            exclude_frozen=False,
            files=[],
            params=params,
            tensors={},
            extra=None,
            rank_extra=[],
        )

    def value_key(self, name: str) -> str:
        """ "master" where there is an fp32 master, else "param"."""
        return MASTER if MASTER in self._params[name].fragments else PARAM

    def fill(
        self, wants: Iterable[Want], progress: Callable[[int], None] | None = None, *, direct: bool = False
    ) -> None:
        """Copy the wanted ranges out of the memory-mapped files."""
        for want in wants:
            stop = want.start + want.target.numel()
            for fragment in self._params[want.name].fragments[want.key]:
                low, high = max(want.start, fragment.start), min(stop, fragment.stop)
                if low < high:
                    values = fragment.values[low - fragment.start : high - fragment.start]
                    want.target[low - want.start : high - want.start].copy_(values)
            if progress is not None:
                progress(want.target.nbytes)

    def extra(self) -> dict[str, Any]:
        """What a checkpoint of ours has in `extra`, as far as upstream stores it, and `upstream`: True.

        Keys: `counters`, `client_state`, `ds_version`, `zero_stage`, `param_groups` (hyper-parameters per group), and
        where there is one `lr_scheduler` and `loss_scaler` (ours: scale, iteration, last_overflow, hysteresis_left).
        """
        main = self._main
        optim = self._optims[0] if self._optims else {}
        base = optim.get("base_optimizer_state") or optim.get("optimizer_state_dict") or {}
        groups = base.get("param_groups", []) if isinstance(base, Mapping) else []
        extra: dict[str, Any] = {
            "upstream": True,
            "counters": {name: int(main.get(name) or 0) for name in _COUNTERS},
            "client_state": {key: value for key, value in main.items() if key not in _OWN_KEYS},
            "ds_version": str(main.get("ds_version")),
            "zero_stage": self.zero_stage,
            "param_groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        }
        if main.get("lr_scheduler") is not None:
            extra["lr_scheduler"] = main["lr_scheduler"]
        scaler = optim.get("loss_scaler")
        if isinstance(scaler, Inert):
            extra["loss_scaler"] = {
                "scale": float(getattr(scaler, "cur_scale", 1.0)),
                "iteration": int(getattr(scaler, "cur_iter", 0)),
                "last_overflow": int(getattr(scaler, "last_overflow_iter", -1)),
                "hysteresis_left": int(getattr(scaler, "cur_hysteresis", 1)),
            }
        return extra


def _as_dict(item: Any, key: str) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get(key), dict):
        raise CheckpointError(f"an optim_states file has no {key!r}; it was not written by upstream's ZeRO optimizer")
    return dict(item[key])


def _plain_stage(stage: Any) -> Any:
    """The number of upstream's stage enum, which arrives as an inert object."""
    return stage.inert_args[0] if isinstance(stage, Inert) else stage


def _group_state(base: Any, group: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Per-element state and numbers of one flat group."""
    state = base["state"].get(group, {}) if isinstance(base, Mapping) else base[group]
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            tensors[key] = value
        elif isinstance(value, (int, float, torch.Tensor)):
            scalars[key] = float(value)
    if "step" not in scalars and isinstance(base, Mapping) and group < len(base.get("param_groups", ())):
        step = base["param_groups"][group].get("step")
        if step is not None:
            scalars["step"] = float(step)
    return tensors, scalars
