"""What this host offers to ranks: accelerator devices, or without one its CPU cores.

Vocabulary: `Devices.kind` is torch's device type; `names` are the devices as the visibility variable spells them
(numbers or UUIDs), one per slot; on a CPU host slots are only counted, any number of them is legal, and no visibility
variable is set. A *core* is a physical core with its sibling hardware threads. Nothing here creates a device context,
and torch is imported only when a function asks for devices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE_VARIABLES = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "hpu": "HABANA_VISIBLE_MODULES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
}
"""Device type -> the variable that says which devices a process sees."""


@dataclass(frozen=True)
class Devices:
    """The slots of this host."""

    kind: str
    """Device type: "cpu", "cuda", "xpu", ..."""
    count: int
    """Number of slots when the user names none."""
    names: tuple[str, ...] = ()
    """How the visibility variable spells each device; empty: by number."""

    @property
    def visible_variable(self) -> str | None:
        """The visibility variable of this kind, None on a CPU host."""
        return VISIBLE_VARIABLES.get(self.kind)

    def spell(self, slots: Sequence[int]) -> str:
        """The value of the visibility variable for these slots."""
        return ",".join(self.names[slot] if slot < len(self.names) else str(slot) for slot in slots)


def local_devices() -> Devices:
    """The devices of this host. `DS_ACCELERATOR` (e.g. "cpu") overrides what torch finds."""
    wanted = os.environ.get("DS_ACCELERATOR", "")
    cpu = Devices("cpu", usable_cores())
    if wanted == "cpu":
        return cpu
    if not wanted and not has_accelerator_nodes():
        return cpu
    import torch

    if not torch.accelerator.is_available():
        if wanted:
            raise RuntimeError(
                f"DS_ACCELERATOR={wanted}: torch {torch.__version__} finds no accelerator; unset it or set it to cpu"
            )
        return cpu
    found = torch.accelerator.current_accelerator()
    kind = wanted or (found.type if found is not None else "cpu")
    variable = VISIBLE_VARIABLES.get(kind)
    visible = os.environ.get(variable, "") if variable else ""
    # Numbers mean the same inside and outside of the ranks and become slot ids (`visible_slots`); UUIDs keep their
    # spelling.
    names = tuple(part.strip() for part in visible.split(",")) if re.search(r"[^\d, ]", visible) else ()
    return Devices(kind, torch.accelerator.device_count(), names)


def visible_slots(devices: Devices) -> list[int] | None:
    """The slot ids in this host's visibility variable, None where it is unset, has UUIDs, or there are no devices."""
    if devices.visible_variable is None or devices.names:
        return None
    value = os.environ.get(devices.visible_variable, "")
    slots = [int(part) for part in value.split(",") if part.strip().isdigit()]
    return slots or None


def usable_cores() -> int:
    """Hardware threads this process may use: its affinity, capped by the control group's CPU quota; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(available, quota) if quota else available)


def threads_per_rank(num_ranks: int) -> int:
    """Default OMP_NUM_THREADS of a rank on a CPU host that runs `num_ranks` of them."""
    return max(1, usable_cores() // max(1, num_ranks))


def parse_core_list(text: str) -> list[int]:
    """`1,3-5` as [1, 3, 4, 5]. ValueError for anything else, an empty range or a core listed twice."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"--bind_core_list {text!r}: {part!r} is neither a core (3) nor a range (4-7)")
        first = int(match.group(1))
        last = int(match.group(2) or first)
        if last < first:
            raise ValueError(f"--bind_core_list {text!r}: the range {part!r} ends before it starts")
        cores.extend(range(first, last + 1))
    if len(set(cores)) != len(cores):
        raise ValueError(f"--bind_core_list {text!r}: a core appears twice")
    return cores


def split_cores(num_ranks: int, core_list: str = "") -> list[tuple[list[int], int]]:
    """Hardware threads and number of physical cores for each local rank: contiguous, equal shares; the remainder is
    left idle.

    Without `core_list` the host's usable physical cores are shared, each with its sibling threads. Raises ValueError
    for fewer cores than ranks or a core this process may not use.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if core_list:
        wanted = parse_core_list(core_list)
        outside = [core for core in wanted if core not in allowed]
        if outside:
            raise ValueError(
                f"--bind_core_list {core_list!r}: core {outside[0]} is not among the usable cores {allowed}"
            )
        physical = [[core] for core in wanted]
    else:
        physical = _physical_cores(allowed)
    share = len(physical) // num_ranks
    if share == 0:
        raise ValueError(
            f"--bind_cores_to_rank: {len(physical)} cores cannot be shared by {num_ranks} ranks; "
            "start fewer ranks or do not bind"
        )
    groups = [physical[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
    return [(sorted(thread for core in group for thread in core), len(group)) for group in groups]


def _physical_cores(threads: Sequence[int]) -> list[list[int]]:
    cores: dict[str, list[int]] = {}
    for thread in threads:
        path = Path(f"/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
        try:
            key = path.read_text().strip()
        except OSError:
            key = str(thread)
        cores.setdefault(key, []).append(thread)
    return list(cores.values())


def _cgroup_quota() -> int | None:
    """Whole CPUs granted by the control group (v2, then v1), None where unlimited or unknown."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return max(1, round(int(quota) / int(period)))


def has_accelerator_nodes() -> bool:
    """Whether the kernel shows any accelerator: saves the import of torch on a plain CPU host. True where it cannot be
    told.
    """
    if os.name != "posix" or not Path("/proc").is_dir():
        return True
    patterns = (
        "nvidia[0-9]*",
        "nvidiactl",
        "dxg",
        "kfd",
        "dri/renderD*",
        "davinci[0-9]*",
        "accel*",
        "habanalabs*",
        "cambricon*",
        "mtgpu*",
    )
    return any(next(Path("/dev").glob(pattern), None) is not None for pattern in patterns)
