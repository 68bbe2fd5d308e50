"""A model on disk, one file per layer, loadable at any number of stages.

    <dir>/layer_07-model_states.safetensors    what layer 7 holds, by its own names (`mlp.weight`)
    <dir>/layers.json                          written last: every layer's file, names, shapes and dtypes

Layers without state have no file; tied layers have one, that of the first layer of their key. With axes besides pipe
and data (tensor parallelism) their coordinates stand in the name: `layer_07-model_01-model_states.safetensors`.

Invariants. A file is complete or not there: it is written aside, flushed and renamed. All files of one save carry its
number, which `layers.json` names, so that a save that was cut short is noticed and not mixed with the one before.
Saving and loading are collective over the pipeline; a failure on one rank is the same error on all.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ds_comm
from ds_pipe.errors import PipelineError

__all__ = ["INDEX", "layer_file", "load_layers", "save_layers"]

INDEX = "layers.json"
_FORMAT = 1
Result = TypeVar("Result")


def layer_file(index: int, coordinates: str = "") -> str:
    """The file name of layer `index`; `coordinates` such as "model_01" where there are axes besides pipe and data."""
    return "-".join(part for part in (f"layer_{index:02d}", coordinates, "model_states.safetensors") if part)


def save_layers(
    directory: Path,
    layers: Mapping[int, nn.Module],
    num_layers: int,
    *,
    coordinates: str = "",
    writes: bool = True,
    exclude_frozen: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write `layers` (those of this rank, by index) into `directory`; collective over `group`, the pipeline.

    Of replicas only one `writes`. PipelineError on all ranks when one cannot.
    """
    number = _first_ones(secrets.token_hex(8), group)

    def write() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not writes:
            return found
        directory.mkdir(parents=True, exist_ok=True)
        for index, module in layers.items():
            state = _state(module, exclude_frozen)
            if state:
                file = directory / layer_file(index, coordinates)
                _write_tensors(file, state, {"save": number, "layer": str(index)})
                described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()}
                found[str(index)] = {"file": file.name, "tensors": described}
        return found

    files: dict[str, Any] = {}
    for part in _together(write, group):
        files |= part
    index = {"format": _FORMAT, "save": number, "num_layers": num_layers, "layers": files}

    def finish() -> None:
        if writes and ds_comm.get_rank(group) == 0:
            _replace(directory / _index_name(coordinates), json.dumps(index, indent=1).encode())

    _together(finish, group)


def load_layers(
    directory: Path,
    layers: Mapping[int, nn.Module],
    num_layers: int,
    *,
    coordinates: str = "",
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Read `layers` (those of this rank, by index) from `directory`, into the tensors that they have.

    PipelineError on all ranks for another model, a save that was cut short or a file that is not there; with `strict`
    also for names that only the model or only the file has.
    """

    def read() -> None:
        index = _read_index(directory / _index_name(coordinates))
        if index["num_layers"] != num_layers:
            raise PipelineError(f"{directory} holds {index['num_layers']} layers; expected the model's {num_layers}")
        found = {at: _checked(directory, index, at, module, strict) for at, module in layers.items()}
        with torch.no_grad():
            for at, module in layers.items():
                state = module.state_dict()
                for name, tensor in found[at].items():
                    state[name].copy_(tensor)

    _together(read, group)


def _checked(directory: Path, index: dict[str, Any], at: int, module: nn.Module, strict: bool) -> dict[str, Tensor]:
    """The tensors of one layer's file, after everything about them has been compared."""
    _refuse_sharded(module)
    state = module.state_dict()
    described = index["layers"].get(str(at), {"tensors": {}})
    missing, more = state.keys() - described["tensors"].keys(), described["tensors"].keys() - state.keys()
    if strict and (missing or more):
        raise PipelineError(
            f"layer {at} in {directory} lacks {sorted(missing)} and has {sorted(more)} besides what the model's layer "
            "has; expected the same names (strict=False takes what fits)"
        )
    if not described["tensors"]:
        return {}
    path = directory / described["file"]
    if not path.is_file():
        raise PipelineError(f"{path} is not there, but {INDEX} lists it; expected a complete save: copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("save") != index["save"]:
                raise PipelineError(f"{path} is of another save than {INDEX}, which was cut short; load another save")
            found = {name: file.get_tensor(name) for name in file.keys() if name in state}  # noqa: SIM118
    except SafetensorError as error:
        raise PipelineError(f"{path} cannot be read: {error}; expected a complete safetensors file") from error
    for name, tensor in found.items():
        if tensor.shape != state[name].shape:
            raise PipelineError(
                f"{name} of layer {at} in {path.name} is {tuple(tensor.shape)}; expected {tuple(state[name].shape)}"
            )
    return found


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"{path} cannot be read: {error}; expected a folder written by PipelineModule.save_state_dict"
        ) from error
    if index.get("format") != _FORMAT:
        raise PipelineError(f"{path} has format {index.get('format')!r}; expected {_FORMAT}")
    return index


def _index_name(coordinates: str) -> str:
    return f"{coordinates}-{INDEX}" if coordinates else INDEX


def _state(module: nn.Module, exclude_frozen: bool) -> dict[str, Tensor]:
    """The state to write, each tensor with memory of its own, which the format asks for."""
    _refuse_sharded(module)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    state: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in module.state_dict().items():
        if exclude_frozen and name in frozen:
            continue
        tensor = tensor.detach().to("cpu").contiguous()
        place = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return state


def _refuse_sharded(module: nn.Module) -> None:
    """PipelineError for parameters that ZeRO stage 3 has taken apart: files would look whole and be empty."""
    for name, parameter in module.named_parameters():
        if getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
            raise PipelineError(
                f"{name} is sharded (ZeRO stage 3) and not whole on this rank; use the engine's save_checkpoint and "
                "load_checkpoint, or save inside deepspeed.zero.GatheredParameters(module.parameters())"
            )


def _write_tensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    save_file(state, aside, metadata=metadata)
    _settle(aside, path)


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    _settle(aside, path)


def _settle(aside: Path, path: Path) -> None:
    """Flush `aside` to the disk and give it its name."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first_ones(value: str, group: dist.ProcessGroup | None) -> str:
    """The value of the first rank of the group."""
    found: list[Any] = [None] * ds_comm.get_world_size(group)
    ds_comm.all_gather_object(found, value, group=group)
    return str(found[0])


def _together(action: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """Every rank's result of `action`, or the first rank's error on all."""
    text, result = "", None
    try:
        result = action()
    except (OSError, PipelineError, SafetensorError) as error:
        text = f"stage {ds_comm.get_rank(group)}: {error}"
    found: list[Any] = [None] * ds_comm.get_world_size(group)
    ds_comm.all_gather_object(found, (text, result), group=group)
    failed = next((said for said, _ in found if said), None)
    if failed is not None:
        raise PipelineError(failed)
    return [outcome for _, outcome in found]
