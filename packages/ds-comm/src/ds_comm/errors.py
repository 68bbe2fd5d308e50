"""The exceptions of ds-comm: four classes, each also a builtin, so that ``except TimeoutError`` and the like work.

Every text says what happened, the values involved (ranks, operation, label, numel), what was expected and what to do.
"""

from __future__ import annotations


class CommError(RuntimeError):
    """Communication cannot go on: transport failure, port taken, use after close, contradicting environment."""


class DivergenceError(CommError):
    """Two ranks of a group called different collectives at the same place of the program. Raised on every rank."""


class RankMissingError(CommError, TimeoutError):
    """A rank died, left, or stayed away from a collective for longer than the watchdog allows. Raised on every rank."""


class CommArgumentError(CommError, ValueError):
    """An argument of a collective is wrong: shape, dtype, device, layout or a rank that does not exist."""
