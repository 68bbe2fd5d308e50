"""Runs a function on N real ranks, from a pool of processes that lives as long as the test session.

Vocabulary
  worker    one process of the pool; it plays rank i of each call's world (`_worker` is its side, `_process` ours).
  call      one `run_ranks`: every rank gets the function by reference (module and name) and pickled arguments.
  failure   a rank that raised, hung, died, or could not clean up (`failure`).
  grace     after the first failure the other ranks have this long to come to their own end.

Invariants
  - Workers start at the first call (fresh interpreters, never a fork), are reused, and die with this process.
  - Every call makes a new world of exactly `world_size` ranks over a FileStore in a temporary folder: no ports.
  - After a failure the pool is whole again: a worker that hung, died, or could not clean up is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from ds_comm.testing._process import Worker
from ds_comm.testing._worker import Call, FunctionRef, Outcome, dumps
from ds_comm.testing.failure import Died, Failure, RankFailure

GRACE_SECONDS = 10.0
CLEAN_SECONDS = 60.0


def _reference(fn: Callable[..., Any]) -> FunctionRef:
    """`fn` as module and name; ValueError where another process cannot find it under these."""
    module_name, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if module_name is None or qualname is None:
        raise ValueError(f"run_ranks needs a plain function, not {fn!r}; pass bound values as arguments instead")
    if "<" in qualname:  # <locals>, <lambda>
        raise ValueError(
            f"run_ranks cannot send {module_name}.{qualname}: ranks import the function by name, so it must be "
            "defined at the top level of a module; move it there and pass what it closes over as arguments"
        )
    module = sys.modules.get(module_name)
    target: Any = module
    for part in qualname.split("."):
        target = getattr(target, part, None)
    if target is not fn:
        raise ValueError(
            f"run_ranks cannot send {fn!r}: {module_name}.{qualname} is {target!r}; ranks import the function by that "
            "name, so it must be found there (not decorated away, not defined by exec)"
        )
    try:
        path = inspect.getsourcefile(fn)
    except TypeError:
        path = None
    return FunctionRef(module_name, qualname, path and os.path.abspath(path))


class RankPool:
    """Processes that play ranks. `run_ranks` uses one shared pool; make your own only to test the pool."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def process_ids(self) -> list[int]:
        """The living workers' process ids, by rank."""
        return [worker.process.pid for worker in self._workers if worker.alive]

    def close(self) -> None:
        """Kill every worker; a later `run` starts new ones."""
        while self._workers:
            self._workers.pop().close()

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        expect_death: Iterable[int] = (),
    ) -> list[Any]:
        """See `run_ranks`."""
        doomed = frozenset(expect_death)
        if world_size < 1 or not doomed <= set(range(world_size)):
            raise ValueError(f"world_size={world_size} and expect_death={sorted(doomed)}: need 0 <= rank < world_size")
        ref, payload = _reference(fn), dumps((args, dict(kwargs or {})))
        with self._lock:
            workers = self._start(world_size)
            folder = tempfile.mkdtemp(prefix="ds-comm-ranks-")
            try:
                for rank, worker in enumerate(workers):
                    store, path = os.path.join(folder, "store"), [os.getcwd() if p == "" else p for p in sys.path]
                    worker.clear_output()
                    worker.connection.send(
                        Call(ref, payload, rank, world_size, store, timeout, dict(env or {}), sys_path=path)
                    )
                outcomes = self._collect(workers, timeout, doomed)
                failures = self._judge(workers, outcomes, timeout, doomed)
                survivors = {rank: workers[rank] for rank, end in outcomes.items() if isinstance(end, Outcome)}
                unclean = self._finish(survivors)
                if not failures and not doomed:  # else it is a consequence
                    failures = unclean
            except BaseException:  # ctrl-C or a test's timeout: ranks are in an unknown place
                for worker in workers:
                    worker.kill()
                raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        if failures:
            raise RankFailure(f"{ref.module}.{ref.qualname}", world_size, failures)
        return [_result(outcomes[rank]) for rank in range(world_size)]

    def _start(self, world_size: int) -> list[Worker]:
        for index, worker in enumerate(self._workers):
            if index < world_size and not worker.alive:
                worker.close()
                self._workers[index] = Worker()
        while len(self._workers) < world_size:
            self._workers.append(Worker())
        workers = self._workers[:world_size]
        for worker in workers:
            worker.wait_ready()
        return workers

    @staticmethod
    def _collect(workers: list[Worker], timeout: float, doomed: frozenset[int]) -> dict[int, Outcome | Died]:
        """Wait for every rank's outcome; a rank that is missing from the answer hung."""
        outcomes: dict[int, Outcome | Died] = {}
        pending: dict[Connection[Any, Any], int] = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                outcome = workers[rank].receive()
                outcomes[rank] = outcome
                failed = rank not in doomed if isinstance(outcome, Died) else outcome.error is not None
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    @staticmethod
    def _judge(
        workers: list[Worker], outcomes: Mapping[int, Outcome | Died], timeout: float, doomed: frozenset[int]
    ) -> list[Failure]:
        """The failures among the outcomes; kills the ranks that hang."""
        hung = [rank for rank in range(len(workers)) if rank not in outcomes]
        written = [worker.dump_stacks() if rank in hung else worker.output() for rank, worker in enumerate(workers)]
        for rank in hung:
            workers[rank].kill()
        failures, now = [], time.monotonic()
        for rank, output in enumerate(written):
            outcome = outcomes.get(rank)
            if outcome is None:
                said = f"hung: killed after {timeout:g} s, or {GRACE_SECONDS:g} s after another rank failed"
                failures.append(Failure(rank, "hung", now, message=said, output=output))
            elif isinstance(outcome, Died):
                if rank not in doomed:  # time 0: a death is the cause of what other ranks raise
                    failures.append(Failure(rank, "died", 0.0, output=output, exit_code=outcome.exit_code))
            elif outcome.error is not None:
                error = (outcome.error, outcome.message, outcome.traceback)
                failures.append(Failure(rank, "raised", outcome.when, *error, output))
            elif rank in doomed:
                failures.append(Failure(rank, "survived", now, message="was expected to die, but returned"))
        return failures

    @staticmethod
    def _finish(workers: Mapping[int, Worker]) -> list[Failure]:
        """Let the ranks that have an outcome tear their world down; the failures are of those that could not."""
        for worker in workers.values():
            with contextlib.suppress(OSError):
                worker.connection.send("finish")
        deadline = time.monotonic() + CLEAN_SECONDS
        failures = []
        for rank, worker in workers.items():
            left = worker.finish(max(deadline - time.monotonic(), 0.0))
            if left:
                said = "returned, but could not leave its world"
                failures.append(Failure(rank, "unclean", time.monotonic(), message=said, output=left))
        return failures


def _result(outcome: Outcome | Died) -> Any:
    return outcome if isinstance(outcome, Died) else pickle.loads(outcome.payload)


@functools.cache
def _shared_pool() -> RankPool:
    return RankPool()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    transport: Literal["shm", "gloo"] | None = None,
    env: Mapping[str, str] | None = None,
    expect_death: Iterable[int] = (),
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `world_size` ranks; returns each rank's result, in rank order.

    The function must be at the top level of a module; the ranks import that module. Arguments and results are pickled,
    tensors by value. In each rank `ds_comm.init_distributed()` is done (gloo over a file store), RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set, torch has one thread, and all generators are seeded alike.

    Args:
        timeout: seconds for the call, without the start of the processes (a second or two, at the first call only).
        transport: force the transport of every group; by default `ds_comm` picks it.
        env: environment variables to set in every rank during the call.
        expect_death: ranks that end their own process (SIGKILL, `os._exit`); each one's result is `Died(exit_code)`.

    Raises:
        RankFailure: a rank raised, hung, died, or did not die as expected; it has a traceback per rank.
        ValueError: the function cannot be found by name, or the arguments contradict each other.
    """
    variables = dict(env or {})
    if transport is not None:
        variables["DS_COMM_TRANSPORT"] = transport
    return _shared_pool().run(fn, world_size, args, kwargs, timeout=timeout, env=variables, expect_death=expect_death)
