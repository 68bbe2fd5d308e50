"""What MPI and Slurm start once per rank: gives the rank torch's variables, then becomes the program.

`python -m deepspeed.launcher.launcher_helper --launcher NAME [--module|--no_python] [--no_local_rank] SCRIPT ARGS`
translates the identity that the starter put into the environment (OMPI_*, PMI_*, MV2_*, SLURM_*) into RANK,
LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, LOCAL_SIZE, CROSS_RANK and CROSS_SIZE, and replaces itself by the rank's
command (exec: no extra process, signals and exit code are the program's own). MASTER_ADDR and MASTER_PORT come from
the runner.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from deepspeed.launcher.devices import has_accelerator_nodes, threads_per_rank
from deepspeed.launcher.spec import Program

IDENTITIES = {
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
}
"""Starter -> its variables for rank, local rank, world size and local world size."""


def identity_from(launcher: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The rank's variables from those of the starter. RuntimeError, naming the variable, where it did not set one."""
    missing = [name for name in IDENTITIES[launcher] if name not in environ]
    if missing:
        raise RuntimeError(
            f"--launcher {launcher}: {missing[0]} is not set; start this through {launcher}, or name another launcher"
        )
    rank, local_rank, size, local_size = (environ[name] for name in IDENTITIES[launcher])
    return {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "CROSS_RANK": str(int(rank) // int(local_size)),
        "CROSS_SIZE": str(max(1, int(size) // int(local_size))),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes the rank's program; returns (2) only where that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m deepspeed.launcher.launcher_helper", allow_abbrev=False)
    parser.add_argument("--launcher", required=True, choices=sorted(IDENTITIES))
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--no_python", action="store_true")
    parser.add_argument("--no_local_rank", action="store_true")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    try:
        identity = identity_from(args.launcher, os.environ)
        command = Program(args.script, tuple(args.args), args.module, args.no_python, args.no_local_rank).command(
            int(identity["LOCAL_RANK"])
        )
        environment = {**os.environ, **identity}
        if "OMP_NUM_THREADS" not in environment and not has_accelerator_nodes():
            environment["OMP_NUM_THREADS"] = str(threads_per_rank(int(identity["LOCAL_SIZE"])))
        os.execvpe(command[0], command, environment)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"[deepspeed] error: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
