"""The parent's handle on one process of the rank pool: how it starts, what it wrote, how it ends.

Invariants
  - A fresh interpreter with this one's `sys.path`, never a fork: threads and locks of the parent do not come along.
  - It leads a session of its own: ctrl-C reaches the parent only, and a kill takes the rank's own children along.
  - A process that ended is reaped at once: a zombie would look alive to peers that check its process id.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import Pipe

from ds_comm.testing._worker import DUMP_SIGNAL, Outcome
from ds_comm.testing.failure import Died

START_SECONDS = 120.0
"""How long a new worker may take to import torch."""
DUMP_SECONDS = 2.0
OUTPUT_CHARS = 8000


class Worker:
    """A handle on one process: its connection and the file that takes its stdout and stderr."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        # Append mode: the file can be cut to nothing between calls while the worker keeps writing at its end.
        self._output = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115 (lives as long as the worker)
        self.ready = False
        # To the kernel, the parent is the *thread* that started the process: ask for its death in the main one only.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        code = f"from ds_comm.testing._worker import main; main({theirs.fileno()}, {parent})"
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
        """Whether the process runs."""
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
        """Forget what was written so far."""
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def close(self) -> None:
        """Kill the process and close the files to it."""
        self.kill()
        self.connection.close()
        self._output.close()

    def receive(self) -> Outcome | Died:
        """The outcome of the call that the worker was sent; blocks until it is there or the process has died."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            return Died(self.reap())
        assert isinstance(outcome, Outcome)
        return outcome

    def finish(self, seconds: float) -> str:
        """Wait for the worker to leave the world; an empty string, or what is wrong (it is killed then)."""
        try:
            left = self.connection.recv() if self.connection.poll(seconds) else "tearing the world down hung"
        except (EOFError, OSError):
            left = f"tearing the world down ended the process: exit code {self.reap()}"
        if left:
            self.kill()
        return str(left)
