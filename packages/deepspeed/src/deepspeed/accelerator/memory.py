"""Memory of a device, in bytes. A device without counters (a CPU) answers zero and an empty dict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from deepspeed.accelerator.topic import Topic


class MemoryTopic(Topic):
    """Counters, limits and page-locked host memory."""

    def _count(self, name: str, device_index: int | None) -> int:
        counter = getattr(self.module, name, None)
        return int(counter(device_index)) if counter is not None else 0

    def _call(self, name: str, *args: Any) -> None:
        action = getattr(self.module, name, None)
        if action is not None:
            action(*args)

    def empty_cache(self) -> None:
        """Give cached blocks back to the device."""
        self._call("empty_cache")

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in tensors."""
        return self._count("memory_allocated", device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Peak of `memory_allocated`."""
        return self._count("max_memory_allocated", device_index)

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        """Begin a new peak."""
        self._call("reset_peak_memory_stats", device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes held by the allocator."""
        return self._count("memory_reserved", device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Peak of `memory_reserved`."""
        return self._count("max_memory_reserved", device_index)

    # Upstream's older names of the same counters.
    memory_cached = memory_reserved
    max_memory_cached = max_memory_reserved
    reset_max_memory_cached = reset_peak_memory_stats = reset_max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """All counters of the allocator."""
        stats = getattr(self.module, "memory_stats", None)
        return dict(stats(device_index)) if stats is not None else {}

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device; of the host for a CPU."""
        if self._name == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(self.module.mem_get_info(device_index)[1])

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes free on the device; on the host for a CPU."""
        if self._name == "cpu":
            return available_host_memory()
        return int(self.module.mem_get_info(device_index)[0])

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        """Page-locked copy in host memory; the tensor itself where there is nothing to copy to (a CPU)."""
        return tensor if self._name == "cpu" else tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is page-locked; a CPU calls every tensor pinned, so that nobody copies."""
        return True if self._name == "cpu" else tensor.is_pinned()

    def unpin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pageable copy of a pinned tensor; torch frees the pinned one when nobody holds it."""
        return tensor if self._name == "cpu" else tensor.clone()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on a device of this type."""
        return tensor.device.type == self._name


def available_host_memory() -> int:
    """Bytes of host memory that a process could get without swapping (Linux's estimate; elsewhere the free pages)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
