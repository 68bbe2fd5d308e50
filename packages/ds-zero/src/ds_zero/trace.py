"""The order in which units are used, kept as a hint. Pure: unit indices in, unit indices out.

A step's uses (forward, then backward) are recorded; the next step's are compared with them as they come. `upcoming`
says which units to gather ahead. A wrong hint costs time, never an error: on a mismatch the rest of the old record is
dropped and learned anew.
"""

from __future__ import annotations

__all__ = ["OrderHint"]


class OrderHint:
    """Recorded sequence of unit indices with a cursor in it."""

    def __init__(self) -> None:
        self._order: list[int] = []
        self._cursor = 0
        self.misses = 0

    def restart(self) -> None:
        """A new step begins."""
        del self._order[self._cursor :]  # the last step was shorter than the record
        self._cursor = 0

    def use(self, unit: int) -> None:
        """Note that `unit` is used now."""
        if self._cursor < len(self._order) and self._order[self._cursor] != unit:
            self.misses += 1
            del self._order[self._cursor :]
        if self._cursor == len(self._order):
            self._order.append(unit)
        self._cursor += 1

    def upcoming(self) -> list[int]:
        """Units expected after the present one, nearest first, each once."""
        return list(dict.fromkeys(self._order[self._cursor :]))
