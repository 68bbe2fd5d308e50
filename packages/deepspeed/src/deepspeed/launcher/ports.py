"""Is a TCP port free on this host, and if not, who holds it.

By default nobody asks: the agent's store binds port 0 and publishes what it got, so there is no window in which
another process could take it. Only a port that the user named is looked at, to answer with the name of the process
that holds it (where /proc allows) before anything starts.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def check_port(port: int) -> None:
    """Raises ValueError for a port out of range and RuntimeError, naming the holder, for one that cannot be bound. 0
    is always right.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--master_port {port}: expected 1 to 65535, or leave it out for a free one")
    if port == 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(port_message(port, error)) from error


def port_message(port: int, error: BaseException) -> str:
    """What to tell a user whose port cannot be bound."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    holder = port_holder(port)
    by = f", held by {holder}" if holder else ""
    return (
        f"--master_port {port} cannot be used on this host{by} ({reason}). "
        "Leave --master_port out to get a free port, or name another one"
    )


def port_holder(port: int) -> str:
    """`process 1234 (python train.py)` for the process listening on `port`, or '' where it cannot be told (other user,
    no /proc).
    """
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening_inodes(Path("/proc/net") / table, port)}
    if not inodes:
        return ""
    targets = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(entry) in targets for entry in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name} ({command[:120]})"
    return "a process of another user"


def _listening_inodes(table: Path, port: int) -> list[str]:
    try:
        rows = table.read_text().splitlines()[1:]
    except OSError:
        return []
    found = []
    for row in rows:
        fields = row.split()
        local, state, inode = fields[1], fields[3], fields[9]
        if state == "0A" and int(local.rsplit(":", 1)[1], 16) == port:  # 0A: LISTEN
            found.append(inode)
    return found
