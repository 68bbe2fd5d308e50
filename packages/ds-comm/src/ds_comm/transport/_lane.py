"""A lane: one thread that runs a group's collectives one after the other, in the order they were asked for.

Why a thread: before each collective the ranks compare stamps, so that a rank that went another way is found before its
data mixes with the others' (gloo matches messages by order alone, mixes what has the same size and ends the process on
what has not). That comparison waits for the slowest rank; on a lane the caller need not. It also lets a collective of
several steps be asynchronous without its steps overtaking those of another.

Invariants
  - Jobs run in submission order; after the first failure every later job fails with the same error, untouched.
  - The caller's thread waits for an event only; what it does while waiting is its own business (``Observer.block``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from ds_comm.ledger import Entry
from ds_comm.transport.base import Work


class Job:
    """One collective on its way: done, and how it ended."""

    __slots__ = ("done", "error", "run")

    def __init__(self, run: Callable[[], None]) -> None:
        self.run: Callable[[], None] | None = run
        self.done = threading.Event()
        self.error: Exception | None = None


class Lane:
    """See the module's docstring."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], None]) -> Job:
        job = Job(run)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        failure: Exception | None = None
        while (job := self._jobs.get()) is not None:
            if failure is None and job.run is not None:
                try:
                    job.run()
                except Exception as error:
                    failure = error
            job.error, job.run = failure, None
            job.done.set()

    def close(self) -> None:
        """Run what is queued, then end the thread; one that is stuck in a wait for a lost rank is left behind."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)


class LaneWork(Work):
    """A job of a lane, and what the caller's thread does once it is done."""

    def __init__(
        self, job: Job, entry: Entry, block: Callable[[Job, Entry], None], then: Callable[[], object] | None
    ) -> None:
        self._job = job
        self._entry = entry
        self._block = block
        self._then = then

    def wait(self) -> None:
        if self.finished:
            return
        with self._entry.timed():
            self._block(self._job, self._entry)
            if self._then is not None:
                self._then()
        self._then = None
        self.finished = True

    def is_completed(self) -> bool:
        return self._job.done.is_set()
