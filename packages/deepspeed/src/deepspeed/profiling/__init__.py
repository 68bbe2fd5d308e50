"""Where a step's operations, time and traffic go: the flops profiler and the trace of a step."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "FlopsProfiler": "deepspeed.profiling.flops_profiler.profiler:FlopsProfiler",
        "get_model_profile": "deepspeed.profiling.flops_profiler.profiler:get_model_profile",
        "trace_steps": "deepspeed.profiling.trace:trace_steps",
    },
    ("flops_profiler",),
)
