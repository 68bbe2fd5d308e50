"""CPU cores shared out between the ranks of a host, as a `numactl` command (the launcher binds ranks by itself)."""

from __future__ import annotations

import os

__all__ = ["get_numactl_cmd", "parse_range", "parse_range_list"]


def parse_range(rng: str) -> range:
    """The cores of "3" or "3-5"; ValueError for anything else."""
    first, _, last = rng.partition("-")
    if not first.isdigit() or (last and not last.isdigit()) or rng.endswith("-"):
        raise ValueError(f"{rng!r} is neither a core (3) nor a range of cores (3-5)")
    cores = range(int(first), int(last or first) + 1)
    if not cores:
        raise ValueError(f"the range {rng!r} ends before it starts")
    return cores


def parse_range_list(range_str: str) -> list[int]:
    """The cores of "0,2-4", in order; ValueError when one appears twice."""
    cores = [core for part in range_str.split(",") for core in parse_range(part.strip())]
    if len(set(cores)) < len(cores):
        raise ValueError(f"a core appears twice in {range_str!r}")
    return sorted(cores)


def get_numactl_cmd(bind_core_list: str | None, num_local_procs: int, local_rank: int) -> tuple[int, list[str]]:
    """(cores of each rank, words to put before the rank's command).

    Args:
        bind_core_list: such as "0,2-4"; None shares the cores that this process may use.

    Raises:
        ValueError: fewer cores than ranks, or a list that makes no sense.
    """
    cores = parse_range_list(bind_core_list) if bind_core_list else sorted(os.sched_getaffinity(0))
    share = len(cores) // num_local_procs
    if not share:
        raise ValueError(f"{len(cores)} cores cannot be shared by {num_local_procs} ranks; give more, or fewer ranks")
    own = cores[local_rank * share : (local_rank + 1) * share]
    return share, ["numactl", "-C", _spelled(own)]


def _spelled(cores: list[int]) -> str:
    """Neighbouring cores as ranges."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
