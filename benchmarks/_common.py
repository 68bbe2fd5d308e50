"""What every benchmark shares: a run, its statistics, its result lines.

A **result** is one line of JSON in `results/<bench>.jsonl`: what was run, median/p20/p80, and the machine, versions
and commit it was run on. `report.py` reads them. The processes that are measured are in `_ranks.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import _memory
from _ranks import HERE, ROOT, Contender, RankGroup, environment


class Bench:
    """One run of one benchmark: its options, its scratch folder with weights and data, its result file."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.scratch = Path(tempfile.mkdtemp(prefix=f"ds-bench-{name}-", dir=options.scratch))
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.machine = machine()
        self._prepared: set[str] = set()

    def __enter__(self) -> Bench:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that ranks and scratch go too
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            shutil.rmtree(self.scratch, ignore_errors=True)
            return
        for path in self.scratch.iterdir():
            if path.suffix != ".log":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"logs of the ranks are kept in {self.scratch}", file=sys.stderr)

    def python(self, contender: Contender) -> str:
        """The interpreter of `contender`."""
        return str(self.options.peer_python) if contender.upstream else sys.executable

    def chosen(self, contenders: list[Contender]) -> list[Contender]:
        """Those that `--only` and the presence of the peer leave."""
        only = self.options.only.split(",") if self.options.only else None
        return [
            c for c in contenders if (only is None or c.label in only) and (not c.upstream or self.options.peer_python)
        ]

    def start(self, contender: Contender) -> RankGroup:
        """Start the ranks of `contender` and wait until it is built."""
        if contender.model not in self._prepared:
            print(f"preparing {contender.model}", flush=True)
            code = "import sys, pathlib, models; models.prepare(sys.argv[1], pathlib.Path(sys.argv[2]))"
            command = [sys.executable, "-c", code, contender.model, str(self.scratch)]
            with (self.scratch / f"prepare-{contender.model}.log").open("w") as log:
                env = environment(False, sys.executable)
                subprocess.run(command, cwd=HERE, check=True, env=env, stdout=log, stderr=subprocess.STDOUT)
            self._prepared.add(contender.model)
        return RankGroup(contender, self.python(contender), self.scratch)

    @contextlib.contextmanager
    def started(self, contenders: list[Contender]) -> Iterator[list[RankGroup]]:
        """All of them, alive at the same time."""
        with contextlib.ExitStack() as stack:
            groups = []
            for contender in contenders:
                groups.append(stack.enter_context(self.start(contender)))
                print(f"  ready: {groups[-1]}  ({_memory.available_mb():.0f} MB left)", flush=True)
            yield groups

    def write(self, contender: Contender, **figures: Any) -> None:
        """Append one result line."""
        line = {
            "bench": self.name,
            "run": self.run,
            "contender": contender.label,
            "stage": contender.stage,
            "model": contender.model,
            "dtype": contender.dtype,
            "world_size": contender.world_size,
            **({"extra": contender.extra} if contender.extra else {}),
            **figures,
            **self.machine,
        }
        write_line(self.options.results / f"{self.name}.jsonl", line)


def summary(values: list[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile (linear between neighbours) and count."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return {"median": percentile(0.5), "p20": percentile(0.2), "p80": percentile(0.8), "n": len(ordered)}


def machine() -> dict[str, Any]:
    """Where and from which commit the figures come."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": f"{model}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "packages", "benchmarks/*.py")),
        "load_at_start": os.getloadavg()[0],
    }


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Append `line` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def options(description: str | None) -> argparse.ArgumentParser:
    """The arguments all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer cases and fewer steps")
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=os.environ.get("DS_BENCH_PEER_PYTHON"),
        help="interpreter of a venv with deepspeed==0.19.8 (see README.md); without it the peer is left out",
    )
    parser.add_argument("--only", help="comma-separated contenders: ours, upstream, fsdp2, ddp, compute, bare")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the jsonl files")
    parser.add_argument("--scratch", type=Path, help="where weights, logs and checkpoints go while it runs")
    return parser
