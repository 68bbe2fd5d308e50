"""The options of the command `deepspeed` and the `LaunchSpec` made of them.

Invariants: `resolve` starts nothing and opens no connection; the address of a first host that is still to be asked
for is left empty in the spec.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence

from deepspeed.launcher.devices import Devices, local_devices, visible_slots
from deepspeed.launcher.environment import collect_exports, environment_files
from deepspeed.launcher.hostfile import (
    Pool,
    fetch_hostfile,
    limit_pool,
    parse_inclusion_exclusion,
    parse_resource_filter,
)
from deepspeed.launcher.launch import add_node_options, logger
from deepspeed.launcher.spec import DEFAULT_PORT, FREE_PORT, LaunchSpec, Program, Transport

DLTS_HOSTFILE = "/job/hostfile"
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm", "nossh")
LOCAL_HOST = "localhost"

_EPILOG = """examples:
  deepspeed train.py --deepspeed_config ds.json          one rank per device; without devices one per CPU core
  deepspeed --num_gpus 2 train.py                        two ranks
  deepspeed --include host-1:0,1@host-2 --hostfile hosts train.py
  deepspeed --dry-run --num_gpus 2 train.py              shows what would be started

other commands, which start nothing:
  deepspeed config explain ds.json                       the config, and where each value came from
  deepspeed plan --model DIR --config ds.json --world 8  what a run would need"""


def build_parser(version: str = "") -> argparse.ArgumentParser:
    """The parser of the command `deepspeed`."""
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a program once per device (or CPU slot) on one or many hosts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"deepspeed {version}")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print each command and its environment; start nothing"
    )
    where = parser.add_argument_group("where to run")
    where.add_argument(
        "-H",
        "--hostfile",
        default=DLTS_HOSTFILE,
        help="lines 'HOST slots=N' (default: %(default)s; without one: this host)",
    )
    where.add_argument("-i", "--include", default="", metavar="SPEC", help="only these: HOST[:SLOT,SLOT][@HOST...]")
    where.add_argument("-e", "--exclude", default="", metavar="SPEC", help="all but these; not together with --include")
    where.add_argument("--num_nodes", type=int, default=-1, metavar="N", help="only the first N hosts")
    where.add_argument(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        metavar="N",
        help="N slots on each host; CPU slots count too",
    )
    where.add_argument("--master_addr", default="", help="address of the first host (default: asked from it)")
    where.add_argument(
        "--master_port",
        type=int,
        default=None,
        help=f"port on the first host (default: a free one; {DEFAULT_PORT} with many hosts)",
    )
    many = parser.add_argument_group("many hosts")
    many.add_argument(
        "--launcher",
        default="pdsh",
        type=str.lower,
        choices=LAUNCHERS,
        help="what starts the other hosts (default: %(default)s)",
    )
    many.add_argument(
        "--launcher_args", default="", metavar="ARGS", help="extra arguments for it, as one quoted string"
    )
    many.add_argument("--force_multi", action="store_true", help="use it even for a single host")
    many.add_argument(
        "--no_ssh",
        action="store_true",
        help="start only this host's part; needs --node_rank (same as --launcher nossh)",
    )
    many.add_argument(
        "--node_rank", type=int, default=-1, metavar="N", help="which line of the hostfile this host is (with --no_ssh)"
    )
    many.add_argument(
        "--no_ssh_check", action="store_true", help="do not test the connection to the first host before the start"
    )
    many.add_argument("--ssh_port", type=int, default=None, metavar="PORT", help="port of ssh on all hosts (pdsh)")
    many.add_argument("--venv_script", default="", metavar="FILE", help="sourced on each host before the start (pdsh)")
    ranks = parser.add_argument_group("the ranks")
    add_node_options(ranks)
    ranks.add_argument(
        "--save_pid",
        action="store_true",
        help="write the ranks' process ids to <tmp>/<launcher's pid>.deepspeed while they run",
    )
    unsupported = parser.add_argument_group("known, not supported yet (an error if given)")
    unsupported.add_argument("--autotuning", choices=("tune", "run"), default="", help=argparse.SUPPRESS)
    unsupported.add_argument("--elastic_training", action="store_true", help=argparse.SUPPRESS)
    unsupported.add_argument("--min_elastic_nodes", type=int, default=-1, help=argparse.SUPPRESS)
    unsupported.add_argument("--max_elastic_nodes", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("user_script", metavar="script", help="the program, followed by its own arguments")
    parser.add_argument("user_args", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse_args(args: Sequence[str] | None = None, version: str = "") -> argparse.Namespace:
    """Parses the command line; options that later versions will bring end in a usage error naming them."""
    parser = build_parser(version)
    parsed = parser.parse_args(args)
    for name in ("autotuning", "elastic_training", "min_elastic_nodes", "max_elastic_nodes"):
        if getattr(parsed, name) not in ("", False, -1):
            parser.error(f"not supported yet: --{name}; leave it out")
    return parsed


def resolve(args: argparse.Namespace, environ: Mapping[str, str], devices: Devices | None = None) -> LaunchSpec:
    """The spec that the options ask for. ValueError, naming option and value, where they cannot be met.

    `devices` are this host's, found out when needed.
    """
    narrowed = args.num_nodes != -1 or args.num_gpus != -1
    if narrowed and (args.include or args.exclude):
        raise ValueError("--num_nodes/--num_gpus count slots and --include/--exclude name them: give one kind only")
    hosts = (
        None if args.hostfile == "None" else fetch_hostfile(args.hostfile)
    )  # accelerate writes None for "no hostfile"
    if hosts is None and args.hostfile not in (DLTS_HOSTFILE, "None"):
        raise ValueError(f"--hostfile {args.hostfile}: no such file; leave it out to use this host only")
    if hosts is None:
        world = _local_world(args, devices or local_devices())
        changed = False
    else:
        whole: Pool = {host: list(range(count)) for host, count in hosts.items()}
        world = limit_pool(parse_inclusion_exclusion(hosts, args.include, args.exclude), args.num_nodes, args.num_gpus)
        # accelerate always sends --num_gpus: it narrows nothing where it says what the hostfile says.
        changed = bool(args.include or args.exclude) or world != whole
    no_ssh = args.no_ssh or args.launcher == "nossh"
    many = (len(world) > 1 or args.force_multi) and not no_ssh
    if no_ssh:
        _check_no_ssh(args, world)
    elif args.node_rank not in (-1, 0):
        raise ValueError(f"--node_rank {args.node_rank}: only with --no_ssh, where each host is started by hand")
    distributed = many or len(world) > 1
    transport = Transport(
        launcher="nossh" if no_ssh else args.launcher,
        args=tuple(shlex.split(args.launcher_args)),
        hostfile="" if hosts is None else os.path.abspath(args.hostfile),
        ssh_port=args.ssh_port,
        venv_script=args.venv_script,
        cwd=os.getcwd(),
        exports=collect_exports(environ, environment_files(), os.getcwd()) if many else {},
        num_slots=args.num_gpus,
        filtered=changed,
    )
    return LaunchSpec(
        world=world,
        program=Program(args.user_script, tuple(args.user_args), args.module, args.no_python, args.no_local_rank),
        node_rank=max(0, args.node_rank),
        master_addr=args.master_addr or ("" if many else "127.0.0.1"),
        master_port=args.master_port if args.master_port is not None else (DEFAULT_PORT if distributed else FREE_PORT),
        save_pid=os.getpid() if args.save_pid else 0,
        log_dir=args.enable_each_rank_log if args.enable_each_rank_log != "None" else "",
        bind_cores=args.bind_cores_to_rank or bool(args.bind_core_list),
        bind_core_list=args.bind_core_list,
        log_level=args.log_level,
        quiet=args.quiet,
        transport=transport,
    )


def is_multinode(spec: LaunchSpec, args: argparse.Namespace) -> bool:
    """Whether the spec is started through its transport rather than here."""
    return (len(spec.world) > 1 or bool(args.force_multi)) and spec.transport.launcher != "nossh"


def _local_world(args: argparse.Namespace, devices: Devices) -> Pool:
    """The slots of this host that the options leave."""
    include = args.include
    visible = visible_slots(devices)
    chosen = bool(args.include or args.exclude or args.num_gpus != -1)
    if visible is not None and chosen:
        logger.info(
            "%s=%s is ignored: slots are chosen on the command line",
            devices.visible_variable,
            ",".join(map(str, visible)),
        )
    elif visible is not None:
        return {LOCAL_HOST: visible}
    if devices.kind != "cpu" and args.num_gpus > devices.count and visible is None:
        raise ValueError(
            f"--num_gpus {args.num_gpus}: this host has {devices.count} {devices.kind} devices; "
            "set DS_ACCELERATOR=cpu for CPU slots"
        )
    count = max(devices.count, args.num_gpus, *(slot + 1 for slot in visible or [-1]))
    pool = parse_resource_filter({LOCAL_HOST: range(count)}, include, args.exclude)
    return limit_pool(pool, args.num_nodes, args.num_gpus)


def _check_no_ssh(args: argparse.Namespace, world: Pool) -> None:
    if len(world) > 1 and not 0 <= args.node_rank < len(world):
        raise ValueError(
            f"--node_rank {args.node_rank}: with --no_ssh expected 0 to {len(world) - 1}, "
            f"this host's place among {', '.join(world)}"
        )
    if len(world) > 1 and not args.master_addr:
        raise ValueError(f"--no_ssh with {len(world)} hosts needs --master_addr, the address of {next(iter(world))}")
