"""Wall-clock and throughput timers.

Owns `SynchronizedWallClockTimer` (named stopwatches), `ThroughputTimer` (samples and, from them, batches per second)
and the names under which the engine records its phases.

Vocabulary: a *micro* timer covers one micro-batch, a *global* timer the whole step. Times come out in milliseconds
(`elapsed`, `mean`), throughput in samples per second.

Invariants:
- Off means free: `NoopTimer` has the same surface and touches no clock and no device.
- On an accelerator a stopwatch records two device events per start/stop and synchronises only when it is read, so
  timing a phase does not serialise it. On a CPU the host clock is the device clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import ds_comm.device
from deepspeed.utils.logging import log_dist

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"
TIME_EPSILON = 1e-6


class _HostMark:
    """A point in time on the host clock."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def ms_until(self, later: _HostMark) -> float:
        return (later.seconds - self.seconds) * 1000.0


class _DeviceMark:
    """A point in the current stream of the accelerator; reading the distance waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.Event(enable_timing=True)
        self.event.record()

    def ms_until(self, later: _DeviceMark) -> float:
        later.event.synchronize()
        return float(self.event.elapsed_time(later.event))


def _mark() -> Any:
    return _HostMark() if ds_comm.device.device_type() == "cpu" else _DeviceMark()


class Timer:
    """One stopwatch. `start`/`stop` pairs add up until `elapsed(reset=True)` or `reset()`."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self._begin: Any = None
        self._intervals: list[tuple[Any, Any]] = []
        self._elapsed_ms = 0.0
        self._records: list[float] = []

    def start(self) -> None:
        """Begin an interval; RuntimeError when one is open."""
        if self.started_:
            raise RuntimeError(f"timer {self.name_!r} is already running; stop() it before start()")
        self._begin, self.started_ = _mark(), True

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End the interval; `reset` forgets earlier ones, `record` keeps this one for `mean()`."""
        if not self.started_:
            raise RuntimeError(f"timer {self.name_!r} is not running; start() it before stop()")
        interval = (self._begin, _mark())
        self.started_ = False
        if reset:
            self._intervals, self._elapsed_ms = [], 0.0
        self._intervals.append(interval)
        if record:
            self._records.append(interval[0].ms_until(interval[1]))

    def reset(self) -> None:
        """Forget everything, a running interval included."""
        self.started_, self._begin = False, None
        self._intervals, self._elapsed_ms, self._records = [], 0.0, []

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds of all closed intervals (and of the open one, which then begins anew)."""
        running = self.started_
        if running:
            self.stop()
        # Marks are turned into one number here: the list does not grow between readings of a long run.
        self._elapsed_ms += sum(begin.ms_until(end) for begin, end in self._intervals)
        self._intervals = []
        total = self._elapsed_ms
        if reset:
            self._elapsed_ms = 0.0
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean in milliseconds of the recorded intervals without the lowest and highest tenth; 0 with none."""
        records = sorted(self._records)
        cut = len(records) // 10
        kept = records[cut : len(records) - cut]
        return sum(kept) / len(kept) if kept else 0.0


class SynchronizedWallClockTimer:
    """Named stopwatches: `timers("fwd").start()`."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        """All stopwatches by name."""
        return self.timers

    def has_timer(self, name: str) -> bool:
        """Whether `name` was ever used."""
        return name in self.timers

    @staticmethod
    def memory_usage() -> str:
        """One line with the device's memory in GiB, and its peak (on a CPU: the resident set of this process)."""
        now, peak = (
            number / 2**30 for number in (ds_comm.device.memory_allocated(), ds_comm.device.max_memory_allocated())
        )
        return f" | mem_allocated: {now:.4f} GB max_mem_allocated: {peak:.4f} GB"

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool | None = None,
        ranks: list[int] | None = None,
    ) -> None:
        """Log `elapsed / normalizer` of each known name on `ranks` (None: rank 0)."""
        if normalizer <= 0.0:
            raise ValueError(f"normalizer is {normalizer}; expected a positive number")
        parts = [f"{n}: {self.timers[n].elapsed(reset=reset) / normalizer:.2f}" for n in names if n in self.timers]
        text = "time (ms) | " + " | ".join(parts)
        log_dist(text + (self.memory_usage() if memory_breakdown else ""), ranks=ranks or [0])

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean milliseconds / normalizer of the recorded intervals of each known name."""
        if normalizer <= 0.0:
            raise ValueError(f"normalizer is {normalizer}; expected a positive number")
        means: dict[str, float] = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means


class NoopTimer:
    """The surface of `SynchronizedWallClockTimer` with no clock behind it."""

    class Timer:
        """A stopwatch that always shows zero."""

        def start(self, **kwargs: Any) -> None:
            """Nothing."""

        def stop(self, **kwargs: Any) -> None:
            """Nothing."""

        def reset(self) -> None:
            """Nothing."""

        def elapsed(self, **kwargs: Any) -> float:
            """Zero."""
            return 0.0

        def mean(self) -> float:
            """Zero."""
            return 0.0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> Timer:
        return self.timer

    def get_timers(self) -> dict[str, Any]:
        """None in use."""
        return {}

    def has_timer(self, name: str) -> bool:
        """Always True: every name answers."""
        return True

    def log(self, names: Iterable[str], **kwargs: Any) -> None:
        """Nothing."""

    def get_mean(self, names: Iterable[str], **kwargs: Any) -> dict[str, float]:
        """Nothing measured."""
        return {}


class ThroughputTimer:
    """Samples per second, from the end of warm-up on.

    Args:
        config: anything with `enabled` and `synchronized` (config section `timers.throughput`); None means both on.
        batch_size: global samples per optimizer step.
        start_step: steps that are not counted (allocator and cache warm-up).
        steps_per_output: log every so many steps; None (or infinity) never logs.
        monitor_memory: add the accelerator's memory to the logged line.
        logging_fn: receives the line; default is `log_dist` on rank 0.
    """

    def __init__(
        self,
        config: Any = None,
        batch_size: int = 1,
        start_step: int = 2,
        steps_per_output: float | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ) -> None:
        self.enabled = bool(getattr(config, "enabled", True))
        self.synchronized = bool(getattr(config, "synchronized", True))
        self.batch_size = max(1, batch_size)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.epoch_count = 0
        self.micro_step_count = 0
        self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self.step_elapsed_time = 0.0
        self._counted_steps = 0
        self._begin: float | None = None
        self._log: Callable[[str], None] = logging_fn or _log_on_rank_0

    def update_epoch_count(self) -> None:
        """A new epoch begins: micro-steps are counted from zero."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """A micro-step begins (called when its data is asked for)."""
        if self.enabled:
            self._begin = self._now() if self.global_step_count >= self.start_step else None

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """The micro-step is over; `global_step` says that it ended an optimizer step. Unpaired stops do nothing."""
        if not self.enabled:
            return
        self.micro_step_count += 1
        if self._begin is not None:
            duration = self._now() - self._begin
            self.total_elapsed_time += duration
            self.step_elapsed_time += duration
            self._begin = None
            self._counted_steps += global_step
        if global_step:
            self.global_step_count += 1
            if report_speed and self._is_report_boundary() and self.step_elapsed_time > 0:
                self._report()
            self.step_elapsed_time = 0.0

    def avg_samples_per_sec(self) -> float:
        """Samples per second over all counted steps; -1.0 before the first one."""
        if self._counted_steps == 0:
            return -1.0
        return self.batch_size * self._counted_steps / (self.total_elapsed_time + TIME_EPSILON)

    def _now(self) -> float:
        if self.synchronized:
            ds_comm.device.synchronize()
        return time.perf_counter()

    def _is_report_boundary(self) -> bool:
        every = self.steps_per_output
        return bool(every) and every is not None and self.global_step_count % every == 0

    def _report(self) -> None:
        current = self.batch_size / (self.step_elapsed_time + TIME_EPSILON)
        memory = SynchronizedWallClockTimer.memory_usage() if self.monitor_memory else ""
        self._log(
            f"epoch={self.epoch_count} micro_step={self.micro_step_count} global_step={self.global_step_count} "
            f"samples_per_sec={self.avg_samples_per_sec():.3f} (this step {current:.3f}){memory}"
        )


def _log_on_rank_0(text: str) -> None:
    log_dist(text, ranks=[0])
