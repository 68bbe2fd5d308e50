"""Runs the ranks of one host: `python -m deepspeed.launcher.launch --world_info=... --node_rank=... script args`.

`deepspeed` calls `run_node` in its own process for a local launch; for many hosts it starts this module once on each
of them. Output of the ranks goes straight through; what this module itself says goes to stderr through the logger
`deepspeed.launcher`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed._lazy import explain_absent
from deepspeed.launcher.devices import local_devices
from deepspeed.launcher.hostfile import decode_world_info
from deepspeed.launcher.ports import check_port
from deepspeed.launcher.report import failure_report, first_failure, one_line
from deepspeed.launcher.signals import SignalInbox
from deepspeed.launcher.spec import LaunchSpec, Program

if TYPE_CHECKING:
    from deepspeed.launcher.agent import RankAgent

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
logger = logging.getLogger("deepspeed.launcher")


def add_node_options(parser: argparse._ActionsContainer) -> None:
    """The options that the command `deepspeed` and the per-host launcher share."""
    parser.add_argument("--module", action="store_true", help="run the script as a module: python -m SCRIPT")
    parser.add_argument(
        "--no_python", action="store_true", help="run the script as a program of its own, without python"
    )
    parser.add_argument(
        "--no_local_rank",
        action="store_true",
        help="do not append --local_rank=N to the arguments of a script that parses it",
    )
    parser.add_argument(
        "--enable_each_rank_log",
        default="",
        metavar="DIR",
        help="write each rank's output to DIR/<time>_rank<N>.log instead of showing it",
    )
    parser.add_argument(
        "--bind_cores_to_rank", action="store_true", help="give each rank an equal share of the CPU cores of its own"
    )
    parser.add_argument(
        "--bind_core_list",
        default="",
        metavar="CORES",
        help="cores to share out, e.g. 0,2-5 (implies --bind_cores_to_rank)",
    )
    parser.add_argument(
        "--log_level", default="info", type=str.lower, choices=LOG_LEVELS, help="how much the launcher itself says"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="the launcher says nothing but errors")


def spec_from_arguments(arguments: Sequence[str] | None = None) -> LaunchSpec:
    """The spec that `spec.launch_arguments` wrote (after `-m deepspeed.launcher.launch`). ValueError for what does not
    fit together.
    """
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.launcher.launch", description="Start the ranks of one host.", allow_abbrev=False
    )
    parser.add_argument("--world_info", required=True, help="base64 of JSON {host: [slot ids]}")
    parser.add_argument("--node_rank", type=int, default=0, help="which of these hosts this is")
    parser.add_argument("--master_addr", default="127.0.0.1", help="address of node 0")
    parser.add_argument(
        "--master_port", type=int, default=29500, help="port of node 0; 0 on a single host: any free one"
    )
    parser.add_argument(
        "--save_pid", type=int, default=0, metavar="INT", help="write the ranks' process ids to <tmp>/<INT>.deepspeed"
    )
    add_node_options(parser)
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    world = decode_world_info(args.world_info)
    return LaunchSpec(
        world=world,
        program=Program(
            args.training_script, tuple(args.training_script_args), args.module, args.no_python, args.no_local_rank
        ),
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        save_pid=args.save_pid,
        log_dir=args.enable_each_rank_log,
        bind_cores=args.bind_cores_to_rank,
        bind_core_list=args.bind_core_list,
        log_level=args.log_level,
        quiet=args.quiet,
    )


def set_up_logging(level: str, quiet: bool) -> None:
    """The launcher's own messages go to stderr, one line each."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[deepspeed] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel("ERROR" if quiet else level.upper())


def run_node(spec: LaunchSpec) -> int:
    """Runs this host's ranks to their end and returns the exit code: 0, that of the rank that failed first, or 128 + n
    after signal n.

    Raises ValueError and RuntimeError for what cannot be started.
    """
    if not 0 <= spec.node_rank < len(spec.world):
        raise ValueError(f"--node_rank {spec.node_rank}: expected 0 to {len(spec.world) - 1}, a place in {spec.hosts}")
    if spec.node_rank == 0:
        check_port(spec.master_port)
    if not spec.program.module and not spec.program.no_python and not Path(spec.program.script).is_file():
        raise ValueError(
            f"no file {spec.program.script!r} in {os.getcwd()}; a module needs --module, another program --no_python"
        )
    devices = local_devices()
    slots = spec.world[spec.hosts[spec.node_rank]]
    logger.info(
        "%d of %d ranks here (node %d of %d, %s): %s",
        *(len(slots), spec.world_size, spec.node_rank, len(spec.world)),
        "CPU slots" if devices.kind == "cpu" else f"{devices.kind} devices {devices.spell(slots)}",
        " ".join([spec.program.script, *spec.program.args]),
    )

    from torch.distributed.elastic.multiprocessing import (
        SignalException,
    )  # only now: help, dry runs and errors above need no torch

    from deepspeed.launcher.agent import RankAgent

    if spec.log_level != "debug":  # the agent repeats at length what the report says
        logging.getLogger(RankAgent.run.__module__).setLevel(logging.CRITICAL)
    inbox = SignalInbox()
    agent = RankAgent(spec, devices, inbox)
    interrupted: signal.Signals | None = None
    with inbox.listening():
        try:
            agent.run()
        except SignalException as error:
            interrupted = error.sigval
        finally:
            agent.stop_ranks(signal.SIGKILL, 0.0)
    if interrupted is not None:
        for (
            outcome
        ) in agent.outcomes:  # a rank that could not end as it should, e.g. failed to write its last checkpoint
            if outcome.returncode not in (0, -interrupted) and "KeyboardInterrupt" not in (text := one_line(outcome)):
                logger.warning("rank %d: %s", outcome.plan.rank, text)
        logger.warning("ended by %s; all ranks are gone", interrupted.name)
        return 128 + interrupted
    return _conclude(spec, agent)


def main(arguments: Sequence[str] | None = None) -> int:
    """The per-host launcher as a command; returns the exit code."""
    spec = spec_from_arguments(arguments)
    set_up_logging(spec.log_level, spec.quiet)
    try:
        return run_node(spec)
    except (ValueError, RuntimeError, TimeoutError) as error:
        logger.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130


def _conclude(spec: LaunchSpec, agent: RankAgent) -> int:
    """The exit code of the launch; on a failure the report is the last thing on stderr."""
    first = first_failure(agent.outcomes)
    remote = agent.remote_failure
    if remote is not None:
        logger.error(
            "rank %s on %s failed first: %s; the ranks of this host were stopped",
            remote["rank"],
            remote["host"],
            remote["text"],
        )
        return int(remote["exit_code"]) or 1
    if first is None:
        return 0
    sys.stderr.write(failure_report(agent.outcomes, first, spec.program.script))
    sys.stderr.flush()
    return first.exit_code


explain_absent(__name__)

if __name__ == "__main__":
    sys.exit(main())
