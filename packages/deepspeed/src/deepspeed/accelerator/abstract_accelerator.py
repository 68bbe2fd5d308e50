"""Upstream's accelerator interface, as one class put together from four topics.

Owns `DeepSpeedAccelerator`. Everything is answered by torch's own device layer (`torch.accelerator`, `torch.cuda`,
`torch.cpu`, ... through `torch.get_device_module`), so that a device type torch knows needs no code here. What a
device does not have (streams, graphs or memory counters on a CPU) gets the answer that makes portable code work: a
context that does nothing, or zero.

Invariant: constructing one, and asking it for names, initialises no device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deepspeed.accelerator.memory import MemoryTopic
from deepspeed.accelerator.random import RandomTopic
from deepspeed.accelerator.streams import StreamTopic
from deepspeed.accelerator.types import TypeTopic

C = TypeVar("C", bound=Callable[..., Any])


class DeepSpeedAccelerator(StreamTopic, MemoryTopic, RandomTopic, TypeTopic):
    """One type of device. Indices default to the current device.

    Args:
        name: torch's name of the device type, such as "cpu" or "cuda".
        communication_backend: torch.distributed backend for tensors on it.
        visible_devices_env: environment variable that selects devices of this type.
    """

    def __init__(self, name: str, communication_backend: str, visible_devices_env: str) -> None:
        self._name = name
        self._communication_backend_name = communication_backend
        self._visible_devices_env = visible_devices_env
        self._compile_backend = "inductor"

    def is_synchronized_device(self) -> bool:
        """Whether work is done when the call returns (a CPU)."""
        return self._name == "cpu"

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def device_name(self, device_index: int | str | None = None) -> str:
        """ "cuda", "cuda:1"; a CPU has no numbered devices, so its name is always "cpu"."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{int(device_index)}"

    def device(self, device_index: int | None = None) -> Any:
        """Context in which `device_index` is current; None on a CPU, as upstream."""
        return None if self._name == "cpu" else self.module.device(device_index)

    def set_device(self, device_index: int) -> None:
        """Make a device current."""
        if self._name != "cpu":
            self.module.set_device(device_index)

    def current_device(self) -> int:
        """Index of the current device; on a CPU the LOCAL_RANK of the environment (0 without)."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self._name == "cpu" else int(self.module.current_device())

    def current_device_name(self) -> str:
        """Name of the current device, "cpu" or for example "cuda:0"."""
        return self.device_name(None if self._name == "cpu" else self.current_device())

    def device_count(self) -> int:
        """Devices of this type on this host; on a CPU the LOCAL_SIZE of the environment (1 without)."""
        return int(os.environ.get("LOCAL_SIZE", "1")) if self._name == "cpu" else int(self.module.device_count())

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for all work on the device."""
        if self._name != "cpu":
            self.module.synchronize(device_index)

    def is_available(self) -> bool:
        """Whether a device of this type can be used."""
        return bool(self.module.is_available())

    def communication_backend_name(self) -> str:
        """torch.distributed backend for tensors on this device."""
        return self._communication_backend_name

    def communication_backend_version(self) -> Any:
        """Version of the backend where torch knows it (NCCL), else None."""
        nccl = getattr(self.module, "nccl", None)
        return nccl.version() if nccl is not None and self._communication_backend_name == "nccl" else None

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call when the device is initialised: at once, or later where torch can wait."""
        lazy = getattr(self.module, "_lazy_call", None)
        return callback() if lazy is None else lazy(callback)

    def export_envs(self) -> list[str]:
        """Prefixes of environment variables that a launcher should forward for this device."""
        return ["NCCL"] if self._communication_backend_name == "nccl" else []

    def visible_devices_envs(self) -> list[str]:
        """Environment variables that select devices."""
        return [self._visible_devices_env]

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        """Select devices in an environment for a child process."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        """Default backend of `engine.compile`."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Choose the default backend; ValueError when torch.compile does not know it."""
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"compile backend is {backend!r}; torch knows {', '.join(known)}")
        self._compile_backend = backend
