"""`LaunchSpec`: the one description of a launch, and everything a rank is started with, made from it.

Vocabulary: a *node* is a host of the pool, its `node_rank` its place in the pool; global ranks are numbered node
after node, slot after slot. A `RankPlan` is the command and the variables of one rank. Invariants: pure data (no
process, no torch); every backend's command, the dry run and the real start are made from the same spec, and
`launch_arguments` is inverted by `launch.spec_from_arguments` (tested over all fields).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepspeed.launcher.devices import Devices, split_cores, threads_per_rank
from deepspeed.launcher.hostfile import encode_world_info
from deepspeed.launcher.script import parses_local_rank

DEFAULT_PORT = 29500
FREE_PORT = 0


@dataclass(frozen=True)
class Program:
    """What each rank runs."""

    script: str
    """A Python file; with `module` a module name; with `no_python` any program."""
    args: tuple[str, ...] = ()
    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    """Never append `--local_rank=N`; otherwise it is where the script parses it."""

    def __post_init__(self) -> None:
        if self.module and self.no_python:
            raise ValueError("--module and --no_python exclude each other: a module is run by python")

    def command(self, local_rank: int | None) -> list[str]:
        """The command line of a rank; None leaves `--local_rank` to whoever starts it."""
        command = (
            [self.script] if self.no_python else [sys.executable, "-u", *(["-m"] if self.module else []), self.script]
        )
        wanted = not self.no_local_rank and local_rank is not None
        if wanted and parses_local_rank(self.script, module=self.module):
            command.append(f"--local_rank={local_rank}")
        return [*command, *self.args]


@dataclass(frozen=True)
class Transport:
    """How other hosts are reached, and what travels there."""

    launcher: str = "pdsh"
    """pdsh, openmpi, mpich, impi, mvapich, slurm or nossh."""
    args: tuple[str, ...] = ()
    """Extra arguments of that tool."""
    hostfile: str = ""
    ssh_port: int | None = None
    venv_script: str = ""
    """Sourced on each host before anything else (pdsh)."""
    cwd: str = ""
    exports: Mapping[str, str] = field(default_factory=dict)
    num_slots: int = -1
    """--num_gpus as given; -1: not given."""
    filtered: bool = False
    """Whether include, exclude, num_nodes or num_gpus narrowed the hostfile."""


@dataclass(frozen=True)
class LaunchSpec:
    """One launch: who takes part, what they run, and how."""

    world: Mapping[str, Sequence[int]]
    """Host -> slot ids, in rank order."""
    program: Program
    node_rank: int = 0
    """The node this process runs."""
    master_addr: str = "127.0.0.1"
    master_port: int = FREE_PORT
    """FREE_PORT: any free one, bound first and then told to the ranks (one node only)."""
    save_pid: int = 0
    """Not 0: write the ranks' process ids to `<tmp>/<save_pid>.deepspeed`."""
    log_dir: str = ""
    """Not empty: each rank's output goes to a file of its own in this folder."""
    bind_cores: bool = False
    bind_core_list: str = ""
    log_level: str = "info"
    quiet: bool = False
    transport: Transport = field(default_factory=Transport)

    @property
    def hosts(self) -> list[str]:
        """Host names by node rank."""
        return list(self.world)

    @property
    def world_size(self) -> int:
        """Number of ranks of all nodes."""
        return sum(len(slots) for slots in self.world.values())

    def first_rank(self, node_rank: int) -> int:
        """Global rank of a node's local rank 0."""
        return sum(len(self.world[host]) for host in self.hosts[:node_rank])


@dataclass(frozen=True)
class RankPlan:
    """What one rank is started with."""

    rank: int
    local_rank: int
    host: str
    slot: int
    command: tuple[str, ...]
    env: Mapping[str, str]
    """Set in addition to the inherited environment."""
    cores: tuple[int, ...] = ()
    """Hardware threads the rank is bound to; empty: not bound."""


def identity(spec: LaunchSpec, node_rank: int, local_rank: int) -> dict[str, str]:
    """The variables that say who a rank is: upstream's set and torchrun's."""
    slots = spec.world[spec.hosts[node_rank]]
    size, local_size, rank = str(spec.world_size), str(len(slots)), str(spec.first_rank(node_rank) + local_rank)
    return {
        "RANK": rank,
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "MASTER_ADDR": spec.master_addr,
        "MASTER_PORT": str(spec.master_port) if spec.master_port else "<free>",
        "CROSS_RANK": str(node_rank),
        "CROSS_SIZE": str(len(spec.world)),
    }


def plan_node(spec: LaunchSpec, node_rank: int, devices: Devices, environ: Mapping[str, str]) -> list[RankPlan]:
    """The plans of one node's ranks. `environ` is what they inherit: OMP_NUM_THREADS set there is left alone."""
    host = spec.hosts[node_rank]
    slots = spec.world[host]
    bound = split_cores(len(slots), spec.bind_core_list) if spec.bind_cores or spec.bind_core_list else []
    plans = []
    for local_rank, slot in enumerate(slots):
        env = identity(spec, node_rank, local_rank)
        if devices.visible_variable is not None:
            env[devices.visible_variable] = devices.spell(slots)
        if "OMP_NUM_THREADS" not in environ:
            if bound:
                env["OMP_NUM_THREADS"] = str(bound[local_rank][1])
            elif devices.kind == "cpu":
                env["OMP_NUM_THREADS"] = str(threads_per_rank(len(slots)))
        plans.append(
            RankPlan(
                rank=int(env["RANK"]),
                local_rank=local_rank,
                host=host,
                slot=slot,
                command=tuple(spec.program.command(local_rank)),
                env=env,
                cores=tuple(bound[local_rank][0]) if bound else (),
            )
        )
    return plans


def launch_arguments(spec: LaunchSpec, node_rank: str) -> list[str]:
    """The per-node command `python -u -m deepspeed.launcher.launch ...`; `node_rank` may be a placeholder such as
    pdsh's `%n`.
    """
    flags = {
        "--module": spec.program.module,
        "--no_python": spec.program.no_python,
        "--no_local_rank": spec.program.no_local_rank,
        "--bind_cores_to_rank": spec.bind_cores,
        "-q": spec.quiet,
    }
    values = {
        "--save_pid": str(spec.save_pid) if spec.save_pid else "",
        "--enable_each_rank_log": spec.log_dir,
        "--bind_core_list": spec.bind_core_list,
        "--log_level": spec.log_level if spec.log_level != "info" else "",
    }
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={encode_world_info(spec.world)}",
        f"--node_rank={node_rank}",
        f"--master_addr={spec.master_addr}",
        f"--master_port={spec.master_port}",
        *(name for name, given in flags.items() if given),
        *(f"{name}={value}" for name, value in values.items() if value),
        spec.program.script,
        *spec.program.args,
    ]
