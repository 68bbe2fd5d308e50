"""How long each pass of a model takes, for `InferenceEngine.profile_model_time`.

A *pass* is one call of the module, or one step of the engine's own decoder. Times are seconds of wall clock, with the
device waited for before and after, so a measured engine is slower where a device runs ahead of its host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ds_comm.device import synchronize

__all__ = ["PassTimer"]


class PassTimer:
    """Collects seconds per pass; passes within a pass are part of it."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._inside = False

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time the block; a block that raises is not counted."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            synchronize()
            begin = time.perf_counter()
            yield
            synchronize()
            self._seconds.append(time.perf_counter() - begin)
        finally:
            self._inside = False

    def take(self) -> list[float]:
        """The seconds collected since the last call, in order."""
        taken, self._seconds = self._seconds, []
        return taken
