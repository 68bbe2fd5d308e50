"""Which rank of how many this process is, from what launchers put into the environment. Pure: reads, sets nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ds_comm.errors import CommArgumentError, CommError

_LOOPBACK = "127.0.0.1"

# launcher, then its variables: rank, size, local rank, local size
_LAUNCHERS = (
    ("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("MVAPICH2", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Launch:
    """One process's place, and where the world's store is."""

    rank: int
    world_size: int
    local_rank: int = 0
    master_addr: str = _LOOPBACK
    master_port: int = 29500

    def variables(self) -> dict[str, str]:
        """As torchrun would have set them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover(
    rank: int = -1,
    world_size: int = -1,
    port: int = 29500,
    *,
    mpi: bool = True,
    explicit: bool = False,
    env: Mapping[str, str] | None = None,
) -> Launch:
    """Find this process's place: arguments, then RANK/WORLD_SIZE, then MPI and SLURM, else a world of one.

    explicit: the caller names the store itself (init_method), so no MASTER_ADDR is needed.
    """
    env = os.environ if env is None else env
    port = _number(env, "MASTER_PORT", port)
    if (rank >= 0) != (world_size > 0):
        raise CommArgumentError(f"rank={rank}, world_size={world_size}: give both or neither")
    if rank >= 0:
        local_rank = _number(env, "LOCAL_RANK", rank)
        return _checked(Launch(rank, world_size, local_rank, env.get("MASTER_ADDR", _LOOPBACK), port))
    if "RANK" in env or "WORLD_SIZE" in env:
        for name in ("RANK", "WORLD_SIZE"):
            if name not in env:
                raise CommError(
                    f"the environment has RANK or WORLD_SIZE but no {name}; a launcher sets both or neither"
                )
        world_size = _number(env, "WORLD_SIZE", 1)
        address = env.get("MASTER_ADDR")
        if address is None:
            if world_size > 1 and not explicit:
                raise CommError(f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set: set it to rank 0's host")
            address = _LOOPBACK
        rank = _number(env, "RANK", 0)
        return _checked(Launch(rank, world_size, _number(env, "LOCAL_RANK", 0), address, port))
    if mpi:
        for launcher, *names in _LAUNCHERS:
            if names[0] in env and names[1] in env:
                return _checked(_from_launcher(launcher, names, port, env, explicit))
    return Launch(0, 1, _number(env, "LOCAL_RANK", 0), env.get("MASTER_ADDR", _LOOPBACK), port)


def _from_launcher(launcher: str, names: list[str], port: int, env: Mapping[str, str], explicit: bool) -> Launch:
    rank, size = _number(env, names[0], 0), _number(env, names[1], 1)
    local_rank = _number(env, names[2], _number(env, "PMI_LOCAL_RANK", 0))
    address = env.get("MASTER_ADDR")
    if address is None and launcher == "SLURM":
        address = _first_node(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    one_host = env.get(names[3], "").isdigit() and int(env[names[3]]) >= size
    if address is None and (one_host or size == 1 or explicit):
        address = _LOOPBACK
    if address is None:
        raise CommError(
            f"started by {launcher} with {size} processes on several hosts, but MASTER_ADDR is not set: set it to the "
            "address of rank 0's host"
        )
    return Launch(rank, size, local_rank, address, port)


def _first_node(nodelist: str) -> str | None:
    """First host of a SLURM list: ``node[003-007,9],other`` -> ``node003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    return None if match is None else match.group(1) + (match.group(2) or "")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return default
    try:
        return int(text)
    except ValueError:
        raise CommError(f"environment variable {name}={text!r}: expected a whole number") from None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise CommError(f"rank {launch.rank} is not in a world of {launch.world_size} (ranks count from 0)")
    return launch
