"""Rank-aware logging on the standard library's `logging`.

Vocabulary
  rank       the process group's rank if there is one, else RANK of the environment, else 0.
  rank-aware a logger whose lines start with "[rank 3] " where several ranks may write (a world of more than one rank,
             or RANK set by a launcher), and are plain otherwise.

Invariants
  - Importing this module and asking for a logger adds no handler and sets no level: that is the application's choice.
    A program without one may call `configure`; it changes nothing where logging is configured already.
  - Nothing here communicates. This module is below the rest of the package: it asks torch.distributed directly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

import torch.distributed as dist

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def current_rank() -> int:
    """This process's rank: of the process group, else of the environment, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def _prefix() -> str:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return f"[rank {dist.get_rank()}] "
    rank = os.environ.get("RANK")
    return f"[rank {rank}] " if rank else ""


class _RankFilter(logging.Filter):
    """Puts the rank before the message when the record is made, so that every handler shows it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = f"{_prefix()}{record.msg}"
        return True


_RANK_FILTER = _RankFilter()


def get_logger(name: str) -> logging.Logger:
    """The standard logger `name`, made rank-aware; the same object at every call."""
    logger = logging.getLogger(name)
    logger.addFilter(_RANK_FILTER)  # adding it again is no change
    return logger


def configure(name: str, level: int | str = logging.INFO) -> logging.Logger:
    """Show the lines of logger `name` and those below it ("ds_zero" and "ds_zero.update") on stderr.

    Call it from a program, not from a library. If `name` or a logger above it has a handler, the application has
    configured logging: then only an unset level is set.
    """
    logger = get_logger(name)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(level)
    return logger


def log_dist(
    message: str,
    ranks: Collection[int] | None = None,
    level: int = logging.INFO,
    *,
    logger: logging.Logger | None = None,
) -> None:
    """Log `message` on some ranks only; not a collective, so any rank may call it alone.

    Args:
        ranks: global ranks that log. None: rank 0 only; `(-1,)`: every rank; empty: none.
        level: a level of `logging`.
        logger: where to; by default the logger "ds_comm".
    """
    chosen = (0,) if ranks is None else ranks
    if -1 in chosen or current_rank() in chosen:
        (logger or get_logger("ds_comm")).log(level, message, stacklevel=2)
