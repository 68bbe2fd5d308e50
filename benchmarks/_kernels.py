"""What the benchmarks of ds-kernels share: contenders of one call timed in turns, the triad, result lines.

One process, no ranks. Contenders take turns round by round, so that a slow moment of a shared machine meets all of
them. `triad` (a = b + s * c over arrays larger than every cache) is measured in the same run: it is what "share of the
bandwidth" means in the results. It counts 12 bytes per element, the reads and the write, not the write's own fill.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import _common
import _memory
import torch
from _ranks import SOURCES

sys.path[:0] = SOURCES  # before the benchmarks' own imports of ds_kernels, which come after this module's

Call = Callable[[], object]


def options(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a kernel benchmark: `_common`'s and the thread counts."""
    parser = _common.options(description)
    parser.add_argument("--threads", default="1,2", help="comma-separated thread counts to measure with")
    parser.add_argument("--rounds", type=int, default=9, help="rounds in which the contenders take turns")
    return parser


class KernelBench:
    """One run: its thread count, its result file."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.arguments = arguments
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.machine = _common.machine()

    def threads(self) -> Iterator[int]:
        """Every thread count asked for, set in torch."""
        for count in (int(part) for part in self.arguments.threads.split(",")):
            torch.set_num_threads(count)
            yield count

    def compare(
        self, case: str, contenders: Mapping[str, Call], *, nbytes: float = 0.0, **facts: Any
    ) -> dict[str, float]:
        """Time the contenders of one case in turns; returns and writes the median seconds of each.

        Args:
            case: what is computed, with its sizes.
            contenders: name -> a call of some 0.1 ms or longer.
            nbytes: bytes that must cross memory per call: gives GB/s in the results.
            facts: anything else worth a place in the line (dtype, peak memory, triad).
        """
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for call in contenders.values():
            call()
        for _ in range(self.arguments.rounds):
            for name, call in contenders.items():
                seconds[name].append(timed(call))
        medians = {}
        for name, values in seconds.items():
            figures = _common.summary(values)
            medians[name] = float(figures["median"])
            rate = {"gb_per_s": nbytes / medians[name] / 1e9} if nbytes else {}
            line = {"bench": self.name, "run": self.run, "case": case, "contender": name}
            threads = torch.get_num_threads()
            _common.write_line(
                self.arguments.results / f"{self.name}.jsonl",
                {
                    **line,
                    "threads": threads,
                    "seconds": figures,
                    **rate,
                    **facts,
                    "torch": torch.__version__,
                    **self.machine,
                },
            )
            print(
                f"{case:44} {threads} threads  {name:24} {medians[name] * 1e3:9.3f} ms"
                + (f" {nbytes / medians[name] / 1e9:7.1f} GB/s" if nbytes else ""),
                flush=True,
            )
        return medians


def timed(call: Call) -> float:
    """Seconds of one call, with the collector off."""
    gc.disable()
    try:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    finally:
        gc.enable()


def triad(numel: int = 1 << 25, rounds: int = 7) -> float:
    """Bytes per second that `a = b + s * c` moves on torch's threads now (median; 12 bytes per element counted)."""
    a, b, c = (torch.ones(numel) for _ in range(3))
    seconds = [timed(lambda: torch.add(b, c, alpha=3.0, out=a)) for _ in range(rounds + 1)][1:]
    return 12 * numel / sorted(seconds)[rounds // 2]


def peak_rss_mb(call: Call) -> tuple[float, float]:
    """Peak resident memory of this process during a call, and what it was before, in MB; sampled every 2 ms.

    Sampled because not every kernel lets a process reset its high-water mark.
    """
    process, done = os.getpid(), threading.Event()
    before = _memory.rss_mb(process)
    peaks = [before]

    def watch() -> None:
        while not done.wait(0.002):
            peaks[0] = max(peaks[0], _memory.rss_mb(process))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peaks[0], before
