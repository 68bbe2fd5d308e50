"""The command lines that start a launch on many hosts: pdsh, Open MPI, MPICH, Intel MPI, MVAPICH and Slurm, all made
from the one `LaunchSpec`.

pdsh starts `deepspeed.launcher.launch` once per host; the MPI launchers and Slurm start one process per rank,
`launcher_helper` (Intel MPI: the program itself, with each rank's variables on the command line). Invariants: pure
functions, nothing is started or looked for; every exported variable and every argument of the program appears in the
command exactly once, quoted where a shell will read it.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deepspeed.launcher.spec import LaunchSpec, identity, launch_arguments


@dataclass(frozen=True)
class Command:
    """A command of this host that starts all ranks."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Set for this command in addition to the inherited environment."""
    kill: tuple[str, ...] = ()
    """Run on an interrupt where ending `argv` does not end the remote ranks."""
    files: dict[str, str] = field(default_factory=dict)
    """Path -> content of files to write first."""


def multinode_command(spec: LaunchSpec) -> Command:
    """The command of `spec.transport.launcher`. ValueError for what that launcher cannot do."""
    name = spec.transport.launcher
    if name not in _BUILDERS:
        raise ValueError(f"--launcher {name}: expected one of {', '.join(sorted(_BUILDERS))}")
    if name in ("openmpi", "mpich", "impi", "mvapich") and spec.transport.filtered:
        raise ValueError(
            f"--launcher {name} takes its hosts from the hostfile as it is: "
            "edit that instead of --include/--exclude/--num_nodes/--num_gpus"
        )
    if name != "pdsh":
        _reject(
            name,
            {"--enable_each_rank_log": spec.log_dir, "--bind_cores_to_rank": spec.bind_cores or spec.bind_core_list},
        )
        _reject(
            name,
            {
                "--save_pid": spec.save_pid,
                "--venv_script": spec.transport.venv_script,
                "--ssh_port": spec.transport.ssh_port,
            },
        )
    return _BUILDERS[name](spec)


def tool_of(launcher: str) -> str:
    """The program that a launcher needs on this host."""
    return {"pdsh": "pdsh", "slurm": "srun"}.get(launcher, "mpirun")


def _reject(launcher: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(
            f"--launcher {launcher} does not support {', '.join(given)}: only pdsh and local launches do; "
            f"use the options of {launcher} itself through --launcher_args"
        )


def _pdsh(spec: LaunchSpec) -> Command:
    transport = spec.transport
    hosts = ",".join(spec.hosts)
    # pdsh replaces %h, %u and %n everywhere: what is not meant is doubled.
    setup = [f"source {shlex.quote(transport.venv_script)};"] if transport.venv_script else []
    setup += [f"export {name}={shlex.quote(value)};" for name, value in transport.exports.items()]
    setup.append(f"cd {shlex.quote(transport.cwd)};")
    node = "DEEPSPEED_NODE_RANK_PLACEHOLDER"
    command = " ".join([*setup, shlex.join(launch_arguments(spec, node))]).replace("%", "%%").replace(node, "%n")
    env = {"PDSH_RCMD_TYPE": "ssh"}
    if transport.ssh_port is not None:
        env["PDSH_SSH_ARGS_APPEND"] = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} -p {transport.ssh_port}".strip()
    # Only this launch; the bracket keeps the pattern from matching the remote shell that runs pkill.
    pattern = " ".join([*launch_arguments(spec, "[0-9]+")[3:8], ""]).replace("deepspeed", "[d]eepspeed", 1)
    kill = ("pdsh", "-S", "-f", "1024", "-w", hosts, f"pkill -TERM -f {shlex.quote(pattern)}")
    return Command(("pdsh", "-S", "-f", "1024", "-w", hosts, *transport.args, command), env, kill)


def _openmpi(spec: LaunchSpec) -> Command:
    transport = spec.transport
    interface = () if "btl_tcp_if_include" in transport.args else ("--mca", "btl_tcp_if_include", "eth0")
    hostfile = ("-hostfile", transport.hostfile) if transport.hostfile else ()
    exports = {"UCX_TLS": "tcp", **_exports(spec)}
    head = ("mpirun", "-n", str(spec.world_size), *hostfile, "--mca", "btl", "^openib", *interface)
    variables = (part for name, value in exports.items() for part in ("-x", f"{name}={value}"))
    return Command((*head, *transport.args, *variables, *_helper(spec)))


def _mpich(spec: LaunchSpec) -> Command:
    return Command(
        (
            *("mpirun", "-n", str(spec.world_size), "-ppn", str(_equal_slots(spec))),
            *spec.transport.args,
            *(part for name, value in _exports(spec).items() for part in ("-genv", name, value)),
            *("-hosts", ",".join(spec.hosts)),
            *_helper(spec),
        )
    )


def _impi(spec: LaunchSpec) -> Command:
    per_host = _equal_slots(spec)
    common = {
        **_exports(spec),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(per_host),
        "LOCAL_SIZE": str(per_host),
    }
    common["CROSS_SIZE"] = str(len(spec.world))
    ranks = []
    for node_rank in range(len(spec.world)):
        for local_rank in range(per_host):
            own = identity(spec, node_rank, local_rank)
            variables = [part for name in ("RANK", "LOCAL_RANK", "CROSS_RANK") for part in ("-env", name, own[name])]
            ranks.append(["-n", "1", *variables, *spec.program.command(local_rank)])
    sections = [part for number, rank in enumerate(ranks) for part in ([":"] if number else []) + rank]
    head = ["mpirun", "-ppn", str(per_host), *spec.transport.args]
    head += [part for name, value in common.items() for part in ("-genv", name, value)]
    return Command((*head, "-hosts", ",".join(spec.hosts), *sections))


def _mvapich(spec: LaunchSpec) -> Command:
    path = str(Path(tempfile.gettempdir()) / "deepspeed_mvapich_hostfile")
    return Command(
        (
            *("mpirun", "-np", str(spec.world_size), "-ppn", str(_equal_slots(spec)), "--hostfile", path),
            *spec.transport.args,
            *(part for name, value in _exports(spec).items() for part in ("-env", f"{name}={value}")),
            *_helper(spec),
        ),
        files={path: "".join(f"{host}\n" for host in spec.hosts)},
    )


def _slurm(spec: LaunchSpec) -> Command:
    per_host = _equal_slots(spec)
    exports = {**_exports(spec), "SLURM_NTASKS_PER_NODE": str(per_host)}
    if spec.transport.hostfile:
        where = [f"--nodes={len(spec.world)}", f"--nodelist={','.join(spec.hosts)}", f"--ntasks-per-node={per_host}"]
    else:
        where = []
    devices = [f"--gpus-per-node={spec.transport.num_slots}"] if spec.transport.num_slots > 0 else []
    # A comma ends a value of --export: such values travel with ALL, in the environment of srun itself.
    listed = ["ALL", *(f"{name}={value}" for name, value in exports.items() if "," not in value)]
    return Command(
        (
            "srun",
            "-n",
            str(spec.world_size),
            *where,
            *devices,
            *spec.transport.args,
            f"--export={','.join(listed)}",
            *_helper(spec),
        ),
        env=exports,
    )


def _exports(spec: LaunchSpec) -> dict[str, str]:
    return {**spec.transport.exports, "MASTER_ADDR": spec.master_addr, "MASTER_PORT": str(spec.master_port)}


def _helper(spec: LaunchSpec) -> tuple[str, ...]:
    program = spec.program
    flags = {"--module": program.module, "--no_python": program.no_python, "--no_local_rank": program.no_local_rank}
    given = (name for name, value in flags.items() if value)
    helper = (sys.executable, "-u", "-m", "deepspeed.launcher.launcher_helper", "--launcher", spec.transport.launcher)
    return (*helper, *given, program.script, *program.args)


def _equal_slots(spec: LaunchSpec) -> int:
    counts = {len(slots) for slots in spec.world.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{host}: {len(slots)}" for host, slots in spec.world.items())
        raise ValueError(
            f"--launcher {spec.transport.launcher} needs equal numbers of slots, not {shown}; change the hostfile"
        )
    return counts.pop()


_BUILDERS: dict[str, Callable[[LaunchSpec], Command]] = {
    "pdsh": _pdsh,
    "openmpi": _openmpi,
    "mpich": _mpich,
    "impi": _impi,
    "mvapich": _mvapich,
    "slurm": _slurm,
}
