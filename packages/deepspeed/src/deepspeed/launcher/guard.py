"""A tiny process that ends the ranks when the launcher cannot: it outlives a SIGKILL of the launcher, whose pipe then
closes.

Run by its path with `python -I -S` and nothing but the standard library, in a session of its own. Its stdin is the
launcher's list of process groups: a line `+PGID` when a rank starts, `-PGID` once its group is gone. At the end of
input every group still listed gets SIGKILL. On Linux the ranks themselves also ask the kernel for it
(PR_SET_PDEATHSIG); the guard covers their children, and other systems.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Reads the list until the launcher is gone, then kills what it left."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        if line.startswith("+"):
            groups.add(int(line[1:]))
        elif line.startswith("-"):
            groups.discard(int(line[1:]))
    for group in groups:
        try:  # noqa: SIM105 - contextlib would double the start time of this process
            os.killpg(group, signal.SIGKILL)
        except OSError:
            pass


if __name__ == "__main__":
    main()
