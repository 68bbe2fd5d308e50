"""Peak memory of running processes, watched from outside (Linux `/proc`).

Three figures per process, in MB (1e6 bytes):
- `hwm`: VmHWM, the kernel's own high-water mark of resident memory, exact; pages shared between ranks count in each.
- `pss`: proportional set size, sampled: a page mapped by n processes counts 1/n in each.
- `data`: the part of `pss` that is not file-backed (anonymous and shared memory): the same, but blind to how many other
  processes happen to map the same libraries.
"""

from __future__ import annotations

import threading
from pathlib import Path

FIELDS = {"Pss": "pss", "Pss_Anon": "data", "Pss_Shmem": "data"}


def hwm_mb(pid: int) -> float:
    """VmHWM of `pid`; 0 for a process that is gone."""
    return _status_mb(pid, "VmHWM")


def rss_mb(pid: int) -> float:
    """Resident memory of `pid` now; 0 for a process that is gone."""
    return _status_mb(pid, "VmRSS")


def reset_hwm(pid: int) -> bool:
    """Start VmHWM of `pid` again from what is resident now; False where the kernel does not allow it."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pss_mb(pid: int) -> dict[str, float]:
    """`pss` and `data` of `pid` now; empty for a process that is gone."""
    result = {"pss": 0.0, "data": 0.0}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in FIELDS:
            result[FIELDS[name]] += int(rest.split()[0]) * 1024 / 1e6
    return result


def available_mb() -> float:
    """Memory that could be had now without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


class PeakSampler:
    """Samples `pss_mb` of some processes every `period` seconds on a thread and keeps the peaks."""

    def __init__(self, pids: list[int], period: float = 0.05) -> None:
        self.pids = pids
        self.peaks: dict[int, dict[str, float]] = {pid: {"pss": 0.0, "data": 0.0} for pid in pids}
        self._period = period
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forget the peaks, the kernel's included."""
        for pid in self.pids:
            reset_hwm(pid)
            self.peaks[pid] = {"pss": 0.0, "data": 0.0}

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def read(self) -> dict[str, float]:
        """Peaks since the last reset, the highest of all processes: `hwm_mb`, `pss_mb`, `data_mb`."""
        return {
            "hwm_mb": max(hwm_mb(pid) for pid in self.pids),
            "pss_mb": max(self.peaks[pid]["pss"] for pid in self.pids),
            "data_mb": max(self.peaks[pid]["data"] for pid in self.pids),
        }

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            for pid in self.pids:
                peak = self.peaks[pid]
                for name, value in pss_mb(pid).items():
                    peak[name] = max(peak[name], value)


def _status_mb(pid: int, field: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":")), 0.0)
