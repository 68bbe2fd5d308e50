"""Config section `flops_profiler`: one step of a run is profiled on rank 0, and reported when it is over."""

from __future__ import annotations

from typing import Any

from deepspeed.config.model_observe import FlopsProfiler as Settings
from deepspeed.events import Callback, EngineView
from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler

__all__ = ["ProfiledStep"]


class ProfiledStep(Callback):
    """Profiles the step that follows `settings.profile_step` finished ones, so that caches and compilers are warm.

    Counting begins when that step's predecessor ends and stops when it ends; no other step pays for it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.profiler: FlopsProfiler | None = None

    def after_step(self, engine: EngineView) -> None:
        settings = self.settings
        if engine.global_steps == settings.profile_step and self.profiler is None:
            module: Any = engine.module  # type: ignore[attr-defined]
            self.profiler = FlopsProfiler(module, ds_engine=engine)
            self.profiler.start_profile()
        elif self.profiler is not None and self.profiler.started:
            self.profiler.stop_profile()
            self.profiler.print_model_profile(
                settings.profile_step,
                settings.module_depth,
                settings.top_modules,
                settings.detailed,
                settings.output_file,
            )
