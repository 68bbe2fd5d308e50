"""The device this process computes on: thin over `torch.accelerator`, with the CPU as a device like any other.

Vocabulary
  accelerator   what torch was built for and finds at run time (cuda, xpu, mps, ...); without one the device is the CPU.
  index         which of the accelerators; the CPU is one device without an index.
  allocated     bytes in tensors on an accelerator; on the CPU the process's resident set, its shared pages included.

Invariants
  - Importing this module asks no driver anything; each function asks when it is called.
  - Every function works on every device: what has no meaning on the CPU (synchronize, set_device) does nothing there.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CLEAR_PEAK_RSS = "5"  # see proc(5)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def device_type() -> str:
    """The type of the device: "cuda", "xpu", ..., or "cpu"."""
    accelerator = _accelerator()
    return "cpu" if accelerator is None else accelerator.type


def current_device() -> torch.device:
    """The device new work goes to; with an index on an accelerator, `torch.device("cpu")` otherwise."""
    accelerator = _accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def set_device(index: int) -> None:
    """Make accelerator `index` (usually the local rank) the current one; nothing to choose on the CPU.

    Raises:
        ValueError: there is no such accelerator.
    """
    if _accelerator() is None:
        return
    count = device_count()
    if not 0 <= index < count:
        raise ValueError(
            f"set_device({index}): this process sees {count} {device_type()} devices (0 to {count - 1}); start at most "
            "one rank per device, or make more of them visible"
        )
    torch.accelerator.set_device_index(index)


def device_count() -> int:
    """How many devices this process can use: the visible accelerators, or 1 for the CPU."""
    return 1 if _accelerator() is None else torch.accelerator.device_count()


def synchronize() -> None:
    """Wait until the current accelerator has done all work submitted to it; returns at once on the CPU."""
    if _accelerator() is not None:
        torch.accelerator.synchronize()


def empty_cache() -> None:
    """Give the accelerator's cached free memory back to the driver; nothing on the CPU."""
    if _accelerator() is not None:
        torch.accelerator.empty_cache()


def _status_bytes(key: str) -> int | None:
    """A memory line of /proc/self/status in bytes; None where the system has no such line."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_allocated() -> int:
    """Bytes in use now: of tensors on the current accelerator, or the CPU process's resident set (VmRSS)."""
    if _accelerator() is not None:
        return int(torch.accelerator.memory_allocated())
    resident = _status_bytes("VmRSS")
    return _peak_rss() if resident is None else resident


def max_memory_allocated() -> int:
    """The largest `memory_allocated` since the start or the last `reset_peak_memory`, in bytes (CPU: VmHWM)."""
    if _accelerator() is not None:
        return int(torch.accelerator.max_memory_allocated())
    peak = _status_bytes("VmHWM")
    return _peak_rss() if peak is None else peak


def reset_peak_memory() -> bool:
    """Start a new peak from here; False where the system cannot (a CPU process outside Linux, or a closed /proc)."""
    if _accelerator() is not None:
        torch.accelerator.reset_peak_memory_stats()
        return True
    try:
        _CLEAR_REFS.write_text(_CLEAR_PEAK_RSS)
    except OSError:
        return False
    return True


def total_memory() -> int:
    """Bytes of memory that the current device has: the accelerator's, or the machine's."""
    if _accelerator() is not None:
        return int(torch.accelerator.get_memory_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_bf16_supported() -> bool:
    """Whether models can train in bfloat16 on the device, without emulation (the CPU always can)."""
    return _is_supported(torch.bfloat16)


def is_fp16_supported() -> bool:
    """Whether models can train in float16 on the device (the CPU can, though no faster than in float32)."""
    return _is_supported(torch.float16)


def _is_supported(dtype: torch.dtype) -> bool:
    kind = device_type()
    if kind == "cpu":
        return True
    if kind == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype in torch.accelerator.get_device_capability()["supported_dtypes"]


def communication_backend() -> str:
    """torch.distributed's backend for the device: "nccl" on cuda, "gloo" on the CPU, and so on."""
    kind = device_type()
    return dist.get_default_backend_for_device("cpu" if kind == "mps" else kind)
