"""Models without memory, and the safetensors files that fill parts of them.

A model made under `parameters_on_meta` has the shapes of its parameters and nothing else, so every rank can make the
whole of it; `SavedWeights.fill` then reads what one part needs, by name, and nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ds_pipe.errors import PartitionError

__all__ = ["SavedWeights", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models made inside have parameters without memory, and real buffers (which their files may not contain)."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class SavedWeights:
    """The safetensors files of a folder: one, or several with an index."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: folder / file for name, file in files.items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise FileNotFoundError(f"{folder} has neither model.safetensors nor {index.name}; expected saved weights")
        self._folder = folder

    def fill(self, piece: nn.Module) -> None:
        """Read what the piece has, on torch's default device. PartitionError for weights that are not there."""
        made: dict[int, nn.Parameter] = {}
        for prefix, module in piece.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        read = self._read(f"{prefix}.{name}", parameter)
                        made[id(parameter)] = nn.Parameter(read, parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if name not in module._non_persistent_buffers_set and f"{prefix}.{name}" in self._files:
                    module._buffers[name] = self._read(f"{prefix}.{name}", buffer)
                elif buffer.device.type == "meta":
                    raise PartitionError(
                        f"buffer {prefix}.{name} has no memory and is not in {self._folder}; make the model under "
                        "parameters_on_meta(), which keeps buffers, instead of torch.device('meta')"
                    )
                else:
                    module._buffers[name] = buffer.to(torch.get_default_device())

    def _read(self, name: str, like: Tensor) -> Tensor:
        if name not in self._files:
            raise PartitionError(f"{name} is not in {self._folder}; expected the weights of this model under its names")
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        if found.shape != like.shape:
            raise PartitionError(
                f"{name} in {self._folder} is {tuple(found.shape)}; expected {tuple(like.shape)} as the model has it"
            )
        # A copy: what was read may be a view of the file's pages.
        return found.to(torch.get_default_device(), like.dtype, copy=True)
