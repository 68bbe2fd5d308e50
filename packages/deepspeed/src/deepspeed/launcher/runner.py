"""The command `deepspeed`: reads the options, then runs the ranks here or starts the other hosts.

Also the import place of upstream's names: `DEEPSPEED_ENVIRONMENT_NAME`, `fetch_hostfile`, `parse_resource_filter`,
`parse_inclusion_exclusion`, `encode_world_info`, `parse_args`, `main`. Importing this module needs neither torch nor
pdsh.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from deepspeed.__about__ import __version__
from deepspeed._lazy import explain_absent
from deepspeed.launcher.devices import VISIBLE_VARIABLES, Devices, local_devices
from deepspeed.launcher.environment import DEEPSPEED_ENVIRONMENT_NAME
from deepspeed.launcher.hostfile import (
    encode_world_info,
    fetch_hostfile,
    parse_inclusion_exclusion,
    parse_resource_filter,
)
from deepspeed.launcher.launch import logger, run_node, set_up_logging
from deepspeed.launcher.multinode import Command, multinode_command, tool_of
from deepspeed.launcher.options import DLTS_HOSTFILE, is_multinode, parse_args, resolve
from deepspeed.launcher.spec import LaunchSpec, launch_arguments, plan_node

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "DLTS_HOSTFILE",
    "encode_world_info",
    "fetch_hostfile",
    "main",
    "parse_args",
    "parse_inclusion_exclusion",
    "parse_resource_filter",
]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, that of the rank that failed first, 128 + n after signal n, 2 for
    bad options.
    """
    options = parse_args(args, __version__)
    set_up_logging(options.log_level, options.quiet)
    try:
        spec = resolve(options, os.environ)
        many = is_multinode(spec, options)
        if options.dry_run:
            sys.stdout.write(dry_run(spec, many, local_devices()))
            return 0
        if many:
            return run_hosts(spec, check_ssh=not options.no_ssh_check)
        return run_node(spec)
    except (ValueError, RuntimeError, TimeoutError) as error:
        logger.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def dry_run(spec: LaunchSpec, many: bool, devices: Devices) -> str:
    """Each command with the variables it gets in addition, per host and rank, as text that a POSIX shell can run."""
    if many and not spec.master_addr:
        spec = dataclasses.replace(spec, master_addr=spec.hosts[0])
    lines = []
    per_host = spec.transport.launcher == "pdsh"
    if many:
        command = multinode_command(spec)
        lines += [f"# on this host, through {spec.transport.launcher}", _shell(command.env, command.argv), ""]
    nodes = range(len(spec.world)) if many else [spec.node_rank]
    for node_rank in nodes:
        host = spec.hosts[node_rank]
        lines.append(
            f"# host {host}: node {node_rank} of {len(spec.world)}, {len(spec.world[host])} of {spec.world_size} ranks"
        )
        if many and per_host:
            lines.append(_shell({}, launch_arguments(spec, str(node_rank))))
        for plan in plan_node(spec, node_rank, devices, {**os.environ, **spec.transport.exports}):
            bound = f", cores {','.join(map(str, plan.cores))}" if plan.cores else ""
            lines += [f"# rank {plan.rank} (slot {plan.slot}{bound})", _shell(dict(plan.env), plan.command)]
        lines.append("")
    return "\n".join(lines)


def run_hosts(spec: LaunchSpec, check_ssh: bool) -> int:
    """Starts all hosts through the spec's transport and returns the exit code. RuntimeError for a missing tool or an
    unreachable first host.
    """
    tool = tool_of(spec.transport.launcher)
    if shutil.which(tool) is None:
        raise RuntimeError(
            f"--launcher {spec.transport.launcher} needs {tool!r}, not on PATH: install it, choose another --launcher, "
            "or start each host yourself with --no_ssh --node_rank N --master_addr ADDRESS"
        )
    if not spec.master_addr:
        spec = dataclasses.replace(spec, master_addr=_first_address(spec, check_ssh))
    command = multinode_command(spec)
    for path, content in command.files.items():
        Path(path).write_text(content)
    logger.info(
        "%d ranks on %d hosts through %s, first host %s",
        spec.world_size,
        len(spec.world),
        spec.transport.launcher,
        spec.master_addr,
    )
    logger.debug("%s", _shell(command.env, command.argv))
    return _run_command(command)


def _run_command(command: Command) -> int:
    """Runs it to its end; signals are relayed, and where that does not reach the hosts the kill command follows."""
    environment = {**os.environ, **command.env}
    for name in VISIBLE_VARIABLES.values():  # this host's devices mean nothing to the others
        environment.pop(name, None)
    process = subprocess.Popen(command.argv, env=environment, start_new_session=True)
    received: list[signal.Signals] = []

    def relay(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if command.kill and len(received) == 1:
            subprocess.run(command.kill, env=environment, check=False)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if len(received) > 2 else number)

    previous = {number: signal.signal(number, relay) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _first_address(spec: LaunchSpec, check: bool) -> str:
    """The first address that the first host names for itself, asked over ssh."""
    host = spec.hosts[0]
    ssh = [
        "ssh",
        "-o",
        "PasswordAuthentication=no",
        *(["-p", str(spec.transport.ssh_port)] if spec.transport.ssh_port else []),
        host,
    ]
    fix = "set up a key (ssh-copy-id), or give --master_addr and --no_ssh_check"
    if shutil.which("ssh") is None:
        raise RuntimeError(f"no ssh on this host to ask {host} for its address; install it, or give --master_addr")
    if check:
        reached = subprocess.run([*ssh, "true"], capture_output=True, text=True, check=False)
        if reached.returncode != 0:
            raise RuntimeError(
                f"host {host} cannot be reached by ssh without a password: {reached.stderr.strip()}; {fix}"
            )
    answer = subprocess.run([*ssh, "hostname -I"], capture_output=True, text=True, check=False)
    addresses = answer.stdout.split()
    if not addresses:
        raise RuntimeError(f"host {host} did not tell its address (`hostname -I`): {answer.stderr.strip()}; {fix}")
    return addresses[0]


def _shell(env: dict[str, str], argv: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(argv)])


explain_absent(__name__)
