"""A progress bar for long reads: on rank 0, on a terminal, and only with rich installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["byte_progress"]

_LONG_NBYTES = 2 << 30


@contextlib.contextmanager
def byte_progress(title: str, total: int, rank: int = 0) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that advances a bar by bytes; None where no bar is shown (short work, no terminal)."""
    if rank != 0 or total < _LONG_NBYTES or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
