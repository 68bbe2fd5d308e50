"""Sections about watching a run: communication logging, the flops profiler, monitors, timers."""

from __future__ import annotations

from deepspeed.config.base import Integer, NonNegative, PathText, Positive, Section

__all__ = ["Comet", "CommsLogger", "CsvMonitor", "FlopsProfiler", "TensorBoard", "Timers", "WandB"]


class CommsLogger(Section):
    """Log every collective with its size and time."""

    enabled: bool = False
    """Record times of collectives (counts and bytes are always recorded)."""
    verbose: bool = False
    """Log each collective as it happens."""
    prof_all: bool = True
    """Record all operations."""
    debug: bool = False
    """Add the calling function's name."""
    prof_ops: tuple[str, ...] = ()
    """Operations to record when prof_all is false."""


class FlopsProfiler(Section):
    """Count floating point operations per module."""

    enabled: bool = False
    """Profile one step."""
    recompute_fwd_factor: NonNegative = 0.0
    """Forward passes repeated by activation checkpointing, as a share of one."""
    profile_step: Positive = 1
    """Steps before the profiled one."""
    module_depth: Integer = -1
    """Depth of the module table; -1 for the innermost."""
    top_modules: Positive = 1
    """Modules shown per depth."""
    detailed: bool = True
    """Show the whole model tree."""
    output_file: PathText | None = None
    """File to write; none logs it."""


class TensorBoard(Section):
    """Write scalars for TensorBoard (rank 0)."""

    enabled: bool = False
    """Write them."""
    output_path: PathText = ""
    """Folder; empty takes the default folder."""
    job_name: str = "DeepSpeedJobName"
    """Folder of this run below output_path."""


class WandB(Section):
    """Send scalars to Weights & Biases (rank 0)."""

    enabled: bool = False
    """Send them."""
    group: str | None = None
    """Group of runs."""
    team: str | None = None
    """Entity."""
    project: str = "deepspeed"
    """Project."""


class CsvMonitor(Section):
    """Write scalars to one CSV file each (rank 0)."""

    enabled: bool = False
    """Write them."""
    output_path: PathText = ""
    """Folder; empty takes the default folder."""
    job_name: str = "DeepSpeedJobName"
    """Folder of this run below output_path."""


class Comet(Section):
    """Send scalars to Comet (rank 0)."""

    enabled: bool = False
    """Send them."""
    samples_log_interval: Positive = 100
    """Samples between two sends."""
    project: str | None = None
    """Project."""
    workspace: str | None = None
    """Workspace."""
    api_key: str | None = None
    """Key of the account."""
    experiment_name: str | None = None
    """Name of the run."""
    experiment_key: str | None = None
    """Key of the run, to continue one."""
    mode: str | None = None
    """get, create or get_or_create."""
    online: bool | None = None
    """Send at once, or write for later."""


class ThroughputTimer(Section):
    """Samples per second."""

    enabled: bool = True
    """Measure it."""
    synchronized: bool = True
    """Synchronise the device before reading the clock."""


class Timers(Section):
    """Timers of the engine."""

    throughput: ThroughputTimer = ThroughputTimer()
    """Samples per second."""
