"""Who is missing, and for how long: the patience of every wait of this package.

Vocabulary
  watchdog  the longest a wait may last while the missing rank's process is alive and silent (600 s by default, the
            environment's ``DEEPSPEED_TIMEOUT`` in minutes, or ``ds_comm.set_watchdog``).
  peer      the process of another rank on this host, watched through a pidfd: its death is seen at once, also while it
            is an unreaped child, and a reused process id cannot be taken for it.

Nothing here raises by itself: transports ask, and raise on every rank.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from ds_comm.errors import CommArgumentError
from ds_comm.log import get_logger

DEFAULT_SECONDS = 600.0
NOTICE_SECONDS = 30.0
"""A wait this long is worth one log line that says for whom."""

SAME_CALLS = (
    "Every rank must make the same collective calls in the same order with the same sizes: look for code that runs on "
    "some ranks only, or for data-dependent branches"
)
"""What to do about a divergence."""

_logger = get_logger(__name__)


def seconds_from_environment() -> float:
    """``DEEPSPEED_TIMEOUT`` (minutes) as seconds, or the default."""
    text = os.environ.get("DEEPSPEED_TIMEOUT")
    if text is None:
        return DEFAULT_SECONDS
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if minutes <= 0:
        raise CommArgumentError(f"DEEPSPEED_TIMEOUT={text!r}: expected a positive number of minutes")
    return minutes * 60.0


@dataclass
class Watchdog:
    """The limit in seconds; one object shared by every communicator of the process, so that it can be changed.

    meanwhile: called again and again in every wait, of whatever group: what others wait for may depend on it.
    """

    seconds: float = DEFAULT_SECONDS
    meanwhile: set[Callable[[], None]] = field(default_factory=set)


class Patience:
    """One wait's clock: says when to look at the peers, writes the one notice, knows when the limit is passed."""

    __slots__ = ("_next_notice", "_started", "limit", "what")

    def __init__(self, watchdog: Watchdog, what: str) -> None:
        self.what = what
        self._started = monotonic()
        self.limit = watchdog.seconds
        self._next_notice = self._started + NOTICE_SECONDS

    @property
    def waited(self) -> float:
        return monotonic() - self._started

    @property
    def exhausted(self) -> bool:
        return self.waited > self.limit

    def notice(self, describe: Callable[[], str]) -> None:
        """Log once per wait, and then at doubling intervals, what is waited for."""
        now = monotonic()
        if now < self._next_notice:
            return
        self._next_notice = now + 2 * (now - self._started)
        _logger.warning(
            "waiting for %.0f s in %s (limit %.0f s): %s", now - self._started, self.what, self.limit, describe()
        )


class Peer:
    """The process of one rank on this host."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._gone = False
        self._fd: int | None = None
        self._poll = select.poll()
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone = True
        except (AttributeError, OSError):  # no pidfd in this kernel or sandbox: ask /proc instead
            self._fd = None
        else:
            self._poll.register(self._fd, select.POLLIN)

    def gone(self) -> bool:
        """True once the process has ended (zombies included)."""
        if not self._gone:
            self._gone = bool(self._poll.poll(0)) if self._fd is not None else not _runs(self.pid)
        return self._gone

    def close(self) -> None:
        if self._fd is not None:
            self._poll.unregister(self._fd)
            os.close(self._fd)
            self._fd, self._gone = None, True


def _runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
