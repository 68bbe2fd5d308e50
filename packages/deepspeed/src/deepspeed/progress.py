"""Listeners that log how training goes: a line every `steps_per_print` steps, phase times, memory.

They subscribe to the engine like any other callback (`deepspeed.events`); the keys `steps_per_print`,
`wall_clock_breakdown` and `memory_breakdown`, and the section `flops_profiler`, switch them on.
"""

from __future__ import annotations

from typing import Any

import torch

import ds_comm
from deepspeed.config import ResolvedConfig
from deepspeed.events import Callback, EngineView
from deepspeed.runtime.utils import see_memory_usage
from deepspeed.utils.logging import log_dist

__all__ = ["BACKWARD", "FORWARD", "STEP", "TRAIN_BATCH", "MemoryLog", "ProgressLog", "progress_listeners"]

FORWARD, BACKWARD, STEP, TRAIN_BATCH = "fwd", "bwd", "step", "train_batch"
"""Names under which the engine times its phases; a pipeline has one for all forwards and backwards of a step."""

PHASES = [FORWARD, BACKWARD, TRAIN_BATCH, STEP]


class ProgressLog(Callback):
    """One line every `every` steps (None, infinity or 0: never).

    Args:
        timers: stopwatches whose times since the last line are logged as well; with no `every`, after each step.
            None: no times.
    """

    def __init__(self, every: float | None, timers: Any = None) -> None:
        self.every = every
        self.timers = timers

    def after_step(self, engine: EngineView) -> None:
        if self.every is None:
            if self.timers is not None:
                self.timers.log(PHASES)
        elif self.every and engine.global_steps % self.every == 0:
            log_dist(
                f"step={engine.global_steps}, skipped={engine.skipped_steps}, lr={engine.get_lr()},"
                f" mom={engine.get_mom()}",
                ranks=[0],
            )
            if self.timers is not None:
                self.timers.log(PHASES)


class MemoryLog(Callback):
    """Memory of device and host on rank 0 at every moment of training."""

    def __init__(self) -> None:
        see_memory_usage("memory after initialize", force=True)

    def after_backward(self, engine: EngineView, loss: torch.Tensor) -> None:
        see_memory_usage(f"memory after backward of step {engine.global_steps + 1}", force=True)

    def after_step(self, engine: EngineView) -> None:
        see_memory_usage(f"memory after step {engine.global_steps}", force=True)

    def on_save(self, engine: EngineView, directory: str, tag: str) -> None:
        see_memory_usage(f"memory after saving {tag}", force=True)

    def on_load(self, engine: EngineView, directory: str, tag: str) -> None:
        see_memory_usage(f"memory after loading {tag}", force=True)


def progress_listeners(config: ResolvedConfig, timers: Any) -> list[Callback]:
    """The listeners that the config asks for."""
    listeners: list[Callback] = []
    if config.steps_per_print is not None or config.wall_clock_breakdown:
        listeners.append(ProgressLog(config.steps_per_print, timers if config.wall_clock_breakdown else None))
    if config.memory_breakdown:
        listeners.append(MemoryLog())
    if config.flops_profiler.enabled and ds_comm.get_rank() == 0:
        from deepspeed.profiling.listener import ProfiledStep  # here: counting imports what nothing else needs

        listeners.append(ProfiledStep(config.flops_profiler))
    return listeners
