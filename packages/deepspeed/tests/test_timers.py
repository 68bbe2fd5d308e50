"""Stopwatches and throughput, with a clock under the test's control."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepspeed import timers as module
from deepspeed.timers import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(module.ds_comm.device, "device_type", lambda: "cpu")
    return now


def test_intervals_add_up_until_read(clock: SimpleNamespace) -> None:
    timers = SynchronizedWallClockTimer()
    for _ in range(3):
        timers("fwd").start()
        clock.seconds += 0.5
        timers("fwd").stop()
        clock.seconds += 7
    assert timers("fwd").elapsed(reset=False) == pytest.approx(1500)
    assert timers("fwd").elapsed() == pytest.approx(1500)
    assert timers("fwd").elapsed() == 0
    assert timers.has_timer("fwd") and not timers.has_timer("bwd")


def test_reading_a_running_timer_lets_it_run(clock: SimpleNamespace) -> None:
    timer = SynchronizedWallClockTimer()("step")
    timer.start()
    clock.seconds += 1
    assert timer.elapsed() == pytest.approx(1000)
    clock.seconds += 2
    timer.stop()
    assert timer.elapsed() == pytest.approx(2000)


def test_stop_with_reset_keeps_only_the_last_interval(clock: SimpleNamespace) -> None:
    timer = SynchronizedWallClockTimer()("step")
    for seconds in (1, 2):
        timer.start()
        clock.seconds += seconds
        timer.stop(reset=True)
    assert timer.elapsed() == pytest.approx(2000)


def test_mean_is_over_recorded_intervals(clock: SimpleNamespace) -> None:
    timers = SynchronizedWallClockTimer()
    for seconds in (1, 3):
        timers("fwd").start()
        clock.seconds += seconds
        timers("fwd").stop(record=True)
    assert timers.get_mean(["fwd", "unknown"], normalizer=2.0) == {"fwd": pytest.approx(1000)}
    assert timers("fwd").mean() == 0


@pytest.mark.parametrize("wrong", ["start twice", "stop first"])
def test_wrong_use_names_the_timer(wrong: str) -> None:
    timer = SynchronizedWallClockTimer()("bwd")
    if wrong == "start twice":
        timer.start()
    with pytest.raises(RuntimeError, match="'bwd'"):
        (timer.start if wrong == "start twice" else timer.stop)()


def test_log_line(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(module, "log_dist", lambda text, ranks: lines.append((text, ranks)))
    timers = SynchronizedWallClockTimer()
    timers("fwd").start()
    clock.seconds += 0.25
    timers("fwd").stop()
    timers.log(["fwd", "never used"])
    assert lines == [("time (ms) | fwd: 250.00", [0])]
    with pytest.raises(ValueError, match="normalizer is 0"):
        timers.log(["fwd"], normalizer=0)


def test_noop_has_the_surface() -> None:
    timers = NoopTimer()
    timers("fwd").start()
    timers("fwd").stop(record=True)
    timers.log(["fwd"], memory_breakdown=True)
    assert timers("fwd").elapsed(reset=False) == 0 and timers.get_mean(["fwd"]) == {} and timers.get_timers() == {}


def run_steps(timer: ThroughputTimer, clock: SimpleNamespace, steps: int, micro_steps: int) -> None:
    for _ in range(steps):
        for micro in range(micro_steps):
            timer.start()
            clock.seconds += 0.5
            timer.stop(global_step=micro == micro_steps - 1)
            clock.seconds += 10  # outside of any step


def test_throughput_skips_the_warm_up_and_what_lies_between(clock: SimpleNamespace) -> None:
    timer = ThroughputTimer(batch_size=8, start_step=2)
    run_steps(timer, clock, 2, 2)
    assert timer.avg_samples_per_sec() == -1.0
    run_steps(timer, clock, 3, 2)
    assert timer.avg_samples_per_sec() == pytest.approx(8.0, rel=1e-5)  # 8 samples in two half seconds


def test_throughput_reports_every_so_many_steps(clock: SimpleNamespace) -> None:
    lines: list[str] = []
    timer = ThroughputTimer(batch_size=4, start_step=0, steps_per_output=2, logging_fn=lines.append)
    run_steps(timer, clock, 5, 1)
    assert len(lines) == 2 and "global_step=2" in lines[0] and "samples_per_sec=8.000" in lines[0]
    never = ThroughputTimer(batch_size=4, start_step=0, steps_per_output=float("inf"), logging_fn=lines.append)
    run_steps(never, clock, 5, 1)
    assert len(lines) == 2


def test_throughput_can_be_off(clock: SimpleNamespace) -> None:
    timer = ThroughputTimer(SimpleNamespace(enabled=False, synchronized=True), batch_size=4, start_step=0)
    run_steps(timer, clock, 3, 1)
    assert timer.avg_samples_per_sec() == -1.0 and timer.global_step_count == 0
