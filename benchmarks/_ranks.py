"""The processes of a benchmark: contenders, their ranks, and taking turns.

A **contender** says what runs: a kind (see `contenders.py`), a ZeRO stage where it has one, and whose interpreter runs
it ("ours": this checkout; "upstream": the peer's venv). A **rank group** is its running ranks. All groups of one
comparison live at the same time and take **turns**, so that a machine which gets slower, or has other work, hits all of
them alike; while one works, the others sleep in a read of stdin.
"""

from __future__ import annotations

import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import _memory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = sorted(str(path) for path in (ROOT / "packages").glob("*/src"))
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Contender:
    """What runs, by `script`, with `threads` per rank. `extra` is merged into the specification that it sees."""

    kind: str
    model: str = "smollm2"
    dtype: str = "bf16"
    stage: int | None = None
    upstream: bool = False
    world_size: int = 2
    random: bool = False
    script: str = "worker.py"
    threads: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name in results: ours, upstream, or the kind."""
        if self.kind != "engine":
            return self.kind
        return "upstream" if self.upstream else "ours"


@dataclass
class Turns:
    """Steps of one group: wall seconds and CPU seconds of the slowest rank, mean loss of the ranks, one of each a step.

    CPU seconds count all threads of a rank and no waiting in the kernel: less disturbed by other work on the machine.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, answers: list[dict[str, Any]]) -> Turns:
        """Combine the ranks' answers to a `steps` command."""

        def per_step(key: str) -> list[tuple[float, ...]]:
            return list(zip(*(answer[key] for answer in answers), strict=True))

        return cls(
            [max(step) for step in per_step("seconds")],
            [max(step) for step in per_step("cpu_seconds")],
            [statistics.fmean(step) for step in per_step("losses")],
        )


class RankGroup:
    """The running ranks of one contender. `ready` is what they said when built (the slowest rank's times)."""

    def __init__(self, contender: Contender, python: str, scratch: Path, timeout: float = 600.0) -> None:
        self.contender = contender
        self.timeout = timeout
        spec = {
            "kind": contender.kind,
            "stage": contender.stage,
            "model": contender.model,
            "dtype": contender.dtype,
            "random": contender.random,
            "folder": str(scratch),
            **contender.extra,
        }
        env = environment(contender.upstream, python, contender.threads)
        env.update(DS_BENCH_SPEC=json.dumps(spec), WORLD_SIZE=str(contender.world_size))
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_WORLD_SIZE=str(contender.world_size))
        self.logs = [
            scratch / f"{contender.label}-{contender.stage}-{time.time_ns()}-rank{rank}.log"
            for rank in range(contender.world_size)
        ]
        self.processes: list[subprocess.Popen[str]] = []
        self._replies: list[Any] = []
        self.started = time.perf_counter()
        for rank, log in enumerate(self.logs):
            receive, send = os.pipe()
            mine = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_BENCH_REPLY_FD": str(send)}
            with log.open("w") as output:
                process = subprocess.Popen(
                    [python, str(HERE / contender.script)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=mine,
                    pass_fds=(send,),
                    text=True,
                )
            os.close(send)
            self.processes.append(process)
            self._replies.append(os.fdopen(receive))
        self.sampler: _memory.PeakSampler | None = None
        self._ready: list[dict[str, Any]] = []

    def __str__(self) -> str:
        c = self.contender
        return f"{c.label}{'' if c.stage is None else f' stage {c.stage}'} {c.model} {c.dtype} x{c.world_size}"

    def __enter__(self) -> RankGroup:
        try:
            self._ready = self.receive()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.sampler is not None:
            self.sampler.stop()
        if error is None:
            try:
                self.send({"do": "exit"})
                for process in self.processes:
                    process.wait(timeout=60)
            except (OSError, subprocess.TimeoutExpired):
                print(f"  {self} did not exit by itself", file=sys.stderr)
        self.kill()

    @property
    def ready(self) -> dict[str, Any]:
        """What the ranks reported when built: numbers as the maximum over ranks, the rest as rank 0 has it."""
        first = self._ready[0]
        return {
            key: max(rank[key] for rank in self._ready) if isinstance(value, (int, float)) else value
            for key, value in first.items()
        }

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self.processes]

    def sample_memory(self) -> _memory.PeakSampler:
        """Watch memory from now on."""
        self.sampler = _memory.PeakSampler(self.pids)
        return self.sampler

    def send(self, command: dict[str, Any]) -> None:
        """Give every rank a command, without waiting."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()

    def receive(self) -> list[dict[str, Any]]:
        """One answer of every rank; a rank that failed, died or is silent too long is an error that shows its log."""
        answers = []
        for rank, reply in enumerate(self._replies):
            readable, _, _ = select.select([reply], [], [], self.timeout)
            line = reply.readline() if readable else ""
            answer = json.loads(line) if line else {"error": "no answer" if not readable else "the process died"}
            if "error" in answer:
                tail = "\n".join(self.logs[rank].read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"rank {rank} of {self}: {answer['error']}\n--- its output ---\n{tail}")
            answers.append(answer)
        return answers

    def ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Command all ranks and wait for their answers."""
        self.send(command)
        return self.receive()

    def steps(self, count: int) -> Turns:
        """Train `count` steps."""
        return Turns.of(self.ask({"do": "steps", "count": count}))

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


def take_turns(groups: list[RankGroup], rounds: int, steps: int, warm_up: int = WARM_UP_STEPS) -> list[Turns]:
    """Warm every group up, then let each train `steps` steps in each round, in a rotating order."""
    turns = [Turns() for _ in groups]
    for group, turn in zip(groups, turns, strict=True):
        turn.losses += group.steps(warm_up).losses
    order = list(zip(groups, turns, strict=True))
    for round_ in range(rounds):
        pivot = round_ % len(order)
        for group, turn in order[pivot:] + order[:pivot]:
            new = group.steps(steps)
            turn.seconds += new.seconds
            turn.cpu_seconds += new.cpu_seconds
            turn.losses += new.losses
    return turns


def environment(upstream: bool, python: str, threads: int = 1) -> dict[str, str]:
    """Environment of a contender's process: its threads, no GPU, this checkout on the path only where it is meant."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DS_BENCH_", "TORCHELASTIC_"))}
    env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    env.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    env.update(HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
    env.pop("PYTHONPATH", None)
    if upstream:  # its build of native code looks for ninja next to its interpreter
        env.update(DS_ACCELERATOR="cpu", PATH=f"{Path(python).parent}{os.pathsep}{env['PATH']}")
    else:
        env["PYTHONPATH"] = os.pathsep.join(SOURCES)
    return env


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
