"""The ranks of one host as processes: started together, watched together, ended together.

Vocabulary: an *outcome* is how one rank ended; `own` tells that it ended by itself and not because the launcher ended
it. Invariants: each rank leads a session and process group of its own, and ending a rank ends its whole group; a rank
never outlives the launcher (kernel death signal on Linux, plus the guard process); after `stop` no rank is alive.
Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepspeed.launcher.spec import RankPlan
from deepspeed.launcher.streams import StreamPump

FAILURE_GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL for the other ranks when one has failed."""
SIGNAL_GRACE = 30.0
"""The same after a signal that the launcher relays: time to write an emergency checkpoint."""
SETTLE_SECONDS = 1.0
"""How long a rank that is printing its traceback may take to end by itself."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    plan: RankPlan
    pid: int
    returncode: int
    """As subprocess gives it: negative is the number of a signal."""
    own: bool
    sign: float
    """time.monotonic() of its first sign of failure."""
    tail: str
    """The end of its error stream."""

    @property
    def exit_code(self) -> int:
        """The exit code as a shell sees it: 128 + n for signal n."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    @property
    def cause(self) -> str:
        """`exit code 7` or `killed by SIGKILL (exit code 137)`."""
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:
            name = f"signal {-self.returncode}"
        return f"killed by {name} (exit code {self.exit_code})"


class RankProcesses:
    """The processes of one host's ranks."""

    def __init__(self, plans: Sequence[RankPlan], log_dir: str = "", pid_file: Path | None = None) -> None:
        self.plans = list(plans)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by global rank
        self.returncodes: dict[int, int] = {}
        self._own: set[int] = set()
        self._log_dir = Path(log_dir) if log_dir else None
        self._pid_file = pid_file  # the ranks' process ids, comma-separated, while they live
        self._pump = StreamPump()
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts all ranks. Raises RuntimeError, with none left running, when a program cannot be started."""
        if self._log_dir is not None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d-%H-%M-%S")
        self._guard = _start_guard()
        try:
            for plan in self.plans:
                self._start_rank(plan, stamp)
        except (OSError, subprocess.SubprocessError) as error:
            self.stop(signal.SIGKILL, grace=0.0)
            raise RuntimeError(f"rank {plan.rank}: cannot start {plan.command[0]!r}: {error}") from error
        if self._pid_file is not None:
            self._pid_file.write_text(",".join(str(pid) for pid in self.pids().values()))
        self._pump.start()

    def pids(self) -> dict[int, int]:
        """Process id by global rank."""
        return {rank: process.pid for rank, process in self.processes.items()}

    def poll(self) -> bool:
        """Notes which ranks have ended by themselves; True once all have."""
        for rank, process in self.processes.items():
            if rank not in self.returncodes and process.poll() is not None:
                self._own.add(rank)
                self._ended(rank, process.returncode)
        return len(self.returncodes) == len(self.processes)

    def failed(self) -> bool:
        """Whether a rank has ended with anything but exit code 0."""
        return any(self.returncodes.values())

    def settle(self) -> None:
        """After a failure: lets ranks that are printing a traceback end by themselves, so that the first one is told
        from its victims.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self.poll() and self._pump.holding() and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(
        self,
        death_signal: signal.Signals = signal.SIGTERM,
        grace: float = FAILURE_GRACE,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """Sends `death_signal` to every rank's group, SIGKILL after `grace` seconds or once `hurry` says so, and waits.

        A second call, or none alive, costs nothing.
        """
        self.poll()
        alive = [process for rank, process in self.processes.items() if rank not in self.returncodes]
        for process in alive:
            _signal_group(process.pid, death_signal)
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline and not hurry():
            time.sleep(0.01)
        for process in alive:
            _signal_group(process.pid, signal.SIGKILL)
        for rank, process in self.processes.items():
            if rank not in self.returncodes:
                self._ended(rank, _reap(process))
        self._release_guard()
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)

    def outcomes(self) -> list[Outcome]:
        """How the ranks ended, in rank order; call after `stop`. Held tracebacks of successful ranks are shown now."""
        self._pump.close()
        result = []
        for plan in self.plans:
            if plan.rank not in self.processes:  # the start broke off before it
                continue
            stream = self._pump.streams[plan.rank]
            code = self.returncodes[plan.rank]
            if code == 0 and stream.held:
                stream.release()
            result.append(
                Outcome(
                    plan=plan,
                    pid=self.processes[plan.rank].pid,
                    returncode=code,
                    own=plan.rank in self._own,
                    sign=stream.sign or 0.0,
                    tail=bytes(stream.tail).decode(errors="replace"),
                )
            )
        return result

    def _start_rank(self, plan: RankPlan, stamp: str) -> None:
        log = self._log_dir / f"{stamp}_rank{plan.rank}.log" if self._log_dir is not None else None
        write_fd = self._pump.open(plan.rank, log)
        try:
            process = subprocess.Popen(
                plan.command,
                env={**os.environ, **plan.env},
                stdin=None
                if plan.local_rank == 0
                else subprocess.DEVNULL,  # one debugger at a time can read the terminal
                stdout=write_fd if log is not None else None,
                stderr=write_fd,
                start_new_session=True,
                preexec_fn=_before_exec(plan.cores),
            )
        finally:
            os.close(write_fd)
        self.processes[plan.rank] = process
        self._tell_guard(f"+{process.pid}\n")

    def _ended(self, rank: int, returncode: int) -> None:
        self.returncodes[rank] = returncode
        pid = self.processes[rank].pid
        if returncode != 0:
            _signal_group(pid, signal.SIGKILL)  # data loader workers and other children it could not end itself
        self._tell_guard(f"-{pid}\n")

    def _tell_guard(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):
                self._guard.stdin.write(line.encode())
                self._guard.stdin.flush()

    def _release_guard(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):
                self._guard.stdin.close()
            self._guard.wait()
            self._guard = None


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _reap(process: subprocess.Popen[bytes]) -> int:
    """The return code after SIGKILL. A process stuck in the kernel (a hung device) cannot be waited for and is given
    up.
    """
    try:
        return process.wait(10.0)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


def _start_guard() -> subprocess.Popen[bytes]:
    path = Path(__file__).with_name("guard.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
    )


def _before_exec(cores: Sequence[int]) -> Callable[[], None]:
    """What a rank does between fork and exec: die with the launcher, run on its cores."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    launcher = os.getpid()
    affinity = set(cores)

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # it died before the kernel knew
                os._exit(128 + signal.SIGKILL)
        if affinity:
            os.sched_setaffinity(0, affinity)

    return prepare
