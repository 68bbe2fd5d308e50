"""Signals that the launcher gets while ranks run: noted when they come, acted upon where it is safe.

A handler that raises could end inside a log call, a store operation or half a clean-up, and be swallowed there. So
the handler only notes; the loops that watch and wait look. Invariant: the first signal is relayed to the ranks, the
second cuts their grace short.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class SignalInbox:
    """What came, in order."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def first(self) -> signal.Signals | None:
        """The signal to relay; None while there is none."""
        return self.received[0] if self.received else None

    def impatient(self) -> bool:
        """Whether a second one came."""
        return len(self.received) > 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the relayed signals while inside; the earlier handlers return afterwards."""
        previous = {number: signal.signal(number, self._note) for number in RELAYED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
