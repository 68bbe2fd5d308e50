"""Runs a function on N real ranks, from a pool of processes that lives as long as the test session.

Vocabulary
  worker    one process of the pool; it plays rank i of each call's world (`_worker` is its side).
  call      one `run_ranks`: every rank gets the function by reference (module and name) and pickled arguments.
  failure   a rank that raised, hung (no outcome in time; its stacks are dumped, then it is killed) or died.
  grace     after the first failure the other ranks have this long to come to their own end.

Invariants
  - Workers start at the first call (fresh interpreters, never a fork), are reused, and die with this process.
  - Every call makes a new world of exactly `world_size` ranks over a FileStore in a temporary folder: no ports, no clashes.
  - After a failure the pool is whole again: a worker that hung, died, or could not clean up is replaced by the next call.
  - A worker that died is reaped at once: a zombie would look alive to peers that check its process id.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from ds_comm.testing._worker import DUMP_SIGNAL, Call, FunctionRef, Outcome, dumps

START_SECONDS = 120.0
"""How long a new worker may take to import torch."""
GRACE_SECONDS = 10.0
CLEAN_SECONDS = 10.0
DUMP_SECONDS = 2.0
OUTPUT_CHARS = 8000


@dataclass(frozen=True)
class Died:
    """Stands in the list of results for a rank that was expected to die; negative codes are signals (-9: SIGKILL)."""

    exit_code: int


@dataclass(frozen=True)
class Failure:
    """What one rank did wrong. `error` is the exception's type name ("" unless raised); `when` a monotonic time."""

    rank: int
    kind: Literal["raised", "hung", "died", "survived"]
    when: float
    error: str = ""
    message: str = ""
    traceback: str = ""
    output: str = ""
    exit_code: int | None = None

    def headline(self) -> str:
        """One line: what happened on this rank."""
        if self.kind == "raised":
            return f"rank {self.rank} raised {self.error}: {self.message}"
        if self.kind == "died":
            return f"rank {self.rank} died with exit code {self.exit_code}"
        return f"rank {self.rank} {self.message}"


class RankFailure(RuntimeError):
    """Some ranks failed; `failures` has one `Failure` each, the first to fail first.

    The text has each rank's traceback (or, for one that hung, the stacks of its threads) and what it wrote.
    """

    def __init__(self, function: str, world_size: int, failures: Sequence[Failure]) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.when))
        first = self.failures[0]
        headline = first.headline().splitlines()[0]
        lines = [f"{len(self.failures)} of {world_size} ranks failed in {function}; first: {headline}"]
        for failure in self.failures:
            lines.append(f"---- {failure.headline()}")
            if failure.traceback:
                lines.append(failure.traceback.rstrip())
            if failure.output:
                lines.append(f"---- rank {failure.rank} wrote\n{failure.output.rstrip()}")
        super().__init__("\n".join(lines))

    def of(self, rank: int) -> Failure:
        """The failure of `rank`; KeyError if it did not fail."""
        for failure in self.failures:
            if failure.rank == rank:
                return failure
        raise KeyError(f"rank {rank} did not fail; ranks {[failure.rank for failure in self.failures]} did")


class _Worker:
    """A handle on one process: its connection and the file that takes its stdout and stderr."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        # Append mode: the file can be cut to nothing between calls while the worker keeps writing at its end.
        self._output = tempfile.TemporaryFile(mode="a+b")
        self.ready = False
        code = f"from ds_comm.testing._worker import main; main({theirs.fileno()}, {os.getpid()})"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the host's name, which may not resolve
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            env=env,
            start_new_session=True,  # ctrl-C is the parent's to handle; and a kill takes the rank's own children along
        )
        theirs.close()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self) -> None:
        """Block until the worker serves; raises RuntimeError with its output if it cannot start."""
        if self.ready:
            return
        try:
            if not self.connection.poll(START_SECONDS):
                raise EOFError
            self.connection.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise RuntimeError(
                f"a rank process of the test pool did not start within {START_SECONDS:.0f} s "
                f"(exit code {self.process.returncode}); it wrote:\n{self.output()}"
            ) from error
        self.ready = True

    def clear_output(self) -> None:
        os.ftruncate(self._output.fileno(), 0)

    def output(self) -> str:
        """What the worker wrote since the last `clear_output` (its end), without gloo's connection chatter."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo] Rank"))[-OUTPUT_CHARS:]

    def dump_stacks(self) -> str:
        """The output, with the Python stack of every thread added to it."""
        before = len(self.output())
        self.process.send_signal(DUMP_SIGNAL)
        deadline = time.monotonic() + DUMP_SECONDS
        while len(self.output()) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)  # the dump is several writes
        return self.output()

    def reap(self) -> int:
        """Collect a dying process; returns its exit code."""
        try:
            return self.process.wait(DUMP_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its connection but lives on: not usable any more
            return self.kill()

    def kill(self) -> int:
        """Kill the process with its children, release its resources; returns its exit code."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.process.wait()

    def close(self) -> None:
        self.kill()
        self.connection.close()
        self._output.close()


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
        self._workers: list[_Worker] = []
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
                self._finish([workers[rank] for rank, outcome in outcomes.items() if isinstance(outcome, Outcome)])
            except BaseException:  # ctrl-C or a test's timeout: ranks are in an unknown place
                for worker in workers:
                    worker.kill()
                raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        if failures:
            raise RankFailure(f"{ref.module}.{ref.qualname}", world_size, failures)
        return [_result(outcomes[rank]) for rank in range(world_size)]

    def _start(self, world_size: int) -> list[_Worker]:
        for index, worker in enumerate(self._workers):
            if index < world_size and not worker.alive:
                worker.close()
                self._workers[index] = _Worker()
        while len(self._workers) < world_size:
            self._workers.append(_Worker())
        workers = self._workers[:world_size]
        for worker in workers:
            worker.wait_ready()
        return workers

    @staticmethod
    def _collect(workers: list[_Worker], timeout: float, doomed: frozenset[int]) -> dict[int, Outcome | Died]:
        """Wait for every rank's outcome; a rank that is missing from the answer hung."""
        outcomes: dict[int, Outcome | Died] = {}
        pending: dict[Connection[Any, Any], int] = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                outcome = _receive(workers[rank])
                outcomes[rank] = outcome
                failed = rank not in doomed if isinstance(outcome, Died) else outcome.error is not None
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    @staticmethod
    def _judge(
        workers: list[_Worker], outcomes: Mapping[int, Outcome | Died], timeout: float, doomed: frozenset[int]
    ) -> list[Failure]:
        """The failures among the outcomes; kills the ranks that hang."""
        failures = []
        hung = [rank for rank in range(len(workers)) if rank not in outcomes]
        stacks = {rank: workers[rank].dump_stacks() for rank in hung}
        for rank in hung:
            workers[rank].kill()
        for rank, worker in enumerate(workers):
            now, outcome = time.monotonic(), outcomes.get(rank)
            if outcome is None:
                said = f"hung (killed after {timeout:g} s, or {GRACE_SECONDS:g} s after another rank failed); its stacks:"
                failures.append(Failure(rank, "hung", now, message=said, output=stacks[rank]))
            elif isinstance(outcome, Died):
                if rank not in doomed:
                    failures.append(Failure(rank, "died", 0.0, output=worker.output(), exit_code=outcome.exit_code))
            elif outcome.error is not None:
                failures.append(
                    Failure(rank, "raised", outcome.when, outcome.error, outcome.message, outcome.traceback, worker.output())
                )
            elif rank in doomed:
                failures.append(Failure(rank, "survived", now, message="was expected to die, but returned"))
        return failures

    @staticmethod
    def _finish(workers: list[_Worker]) -> None:
        """Let the ranks that have an outcome tear their world down; kill those that cannot."""
        for worker in workers:
            try:
                worker.connection.send("finish")
            except OSError:
                worker.kill()
        deadline = time.monotonic() + CLEAN_SECONDS
        for worker in workers:
            try:
                clean = worker.connection.poll(max(deadline - time.monotonic(), 0.0)) and worker.connection.recv() == ""
            except (EOFError, OSError):
                clean = False
            if not clean:
                worker.kill()


def _receive(worker: _Worker) -> Outcome | Died:
    try:
        outcome = worker.connection.recv()
    except (EOFError, OSError):
        return Died(worker.reap())
    assert isinstance(outcome, Outcome)
    return outcome


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
    return _shared_pool().run(
        fn, world_size, args, kwargs, timeout=timeout, env=variables, expect_death=expect_death
    )
