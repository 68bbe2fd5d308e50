"""The logger of the engine and upstream's ways of logging by rank.

Owns `logger` (name "DeepSpeed", a plain `logging.Logger` from ds_comm's rank-aware factory) and `log_dist`. Lines of
the logger carry the rank by themselves where there are several. Importing this module configures nothing;
`deepspeed.init_distributed` makes the logger visible if the application has not done so.

Invariant of `log_dist`, kept from upstream to the letter because scripts rely on it: before communication is
initialised every call is logged, under rank -1; afterwards only where the rank is in `ranks`, everywhere when
`ranks[0] == -1`, and nowhere when `ranks` is None or empty.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Sequence
from typing import Any

import ds_comm
from deepspeed._lazy import explain_absent
from ds_comm.log import get_logger

logger: logging.Logger = get_logger("DeepSpeed")

log_levels: dict[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def _rank_if_chosen(ranks: Sequence[int] | None) -> int | None:
    """The rank to log under, or None for silence (see the module's invariant)."""
    if not ds_comm.is_initialized():
        return -1
    rank = ds_comm.get_rank()
    chosen = bool(ranks) and ranks is not None and (ranks[0] == -1 or rank in ranks)
    return rank if chosen else None


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the chosen ranks (see the module's invariant). Not a collective: any rank may call it alone."""
    rank = _rank_if_chosen(ranks)
    if rank is not None:
        prefix = "[Rank -1] " if rank == -1 else ""
        logger.log(level, f"{prefix}{message}", stacklevel=2)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """`log_dist`, but the same message for the same ranks only once in this process."""
    _log_dist_once(message, None if ranks is None else tuple(ranks), level)


@functools.lru_cache(maxsize=1024)
def _log_dist_once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks=ranks, level=level)


@functools.lru_cache(maxsize=1024)
def warning_once(message: str) -> None:
    """Warn with this message only once in this process."""
    logger.warning(message)


def print_json_dist(message: dict[str, Any], ranks: Sequence[int] | None = None, path: str | None = None) -> None:
    """Write `message` plus the rank as JSON to the file `path` on the chosen ranks; log it when there is no path."""
    rank = _rank_if_chosen(ranks)
    if rank is None:
        return
    text = json.dumps({**message, "rank": rank})
    if path is None:
        logger.info(text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def get_log_level_from_string(log_level_str: str) -> int:
    """Numeric level of "debug", "info", "warning", "error" or "critical" (any case); ValueError for another word."""
    try:
        return log_levels[log_level_str.lower()]
    except KeyError:
        raise ValueError(f"log level is {log_level_str!r}; expected one of {', '.join(log_levels)}") from None


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of `custom_logger` (default: the DeepSpeed logger) by name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def get_caller_func(frame: int = 3) -> str:
    """Name of the function `frame` calls up; "" at the top of the stack."""
    current = inspect.currentframe()
    for _ in range(frame):
        current = current.f_back if current is not None else None
    return current.f_code.co_name if current is not None else ""


explain_absent(__name__)
