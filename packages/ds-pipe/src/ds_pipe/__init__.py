"""Pipeline parallelism for PyTorch with schedules as plain data.

The planning half, which needs neither torch nor ranks: schedules (`schedule`) that are generated, proven, simulated,
chosen and drawn; optimal splits of layers into stages (`partition`); rank grids (`topology`); upstream's schedule
classes (`upstream`). The running half: models as lists of layers (`layers`, `module`) and the `pipeline` that runs a
plan on them, one rank per stage (`executor`), with causal language models of transformers as layers (`huggingface`).
Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_pipe.__about__ import __version__

if TYPE_CHECKING:
    from ds_pipe._weights import parameters_on_meta
    from ds_pipe.errors import PartitionError, PipelineError, ScheduleError
    from ds_pipe.executor import Pipeline, pipeline
    from ds_pipe.grid import PipelineParallelGrid
    from ds_pipe.huggingface import causal_lm_loss, huggingface_name, split_causal_lm
    from ds_pipe.layers import LayerSpec, TiedLayerSpec
    from ds_pipe.measure import Memory, measure_memory, measure_run
    from ds_pipe.module import PipelineModule
    from ds_pipe.partition import balanced, partition_layers, uniform
    from ds_pipe.profile import profile_layers
    from ds_pipe.rng import layer_seed, seeded
    from ds_pipe.schedule import (
        SCHEDULES,
        Action,
        Choice,
        Costs,
        Measured,
        Program,
        Recv,
        Schedule,
        Send,
        Simulation,
        Span,
        Transfer,
        Verdict,
        build,
        check_program,
        choose,
        gpipe,
        inference,
        interleaved,
        lower,
        one_f_one_b,
        simulate,
        to_svg,
        to_text,
        to_trace,
        validate,
        zb_h1,
        zb_v,
    )
    from ds_pipe.sync import GradientSync, PlainSync
    from ds_pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology
    from ds_pipe.upstream import (
        BackwardPass,
        BufferOpInstruction,
        DataParallelSchedule,
        ForwardPass,
        InferenceSchedule,
        LoadMicroBatch,
        OptimizerStep,
        PipeInstruction,
        PipeSchedule,
        RecvActivation,
        RecvGrad,
        ReduceGrads,
        ReduceTiedGrads,
        SendActivation,
        SendGrad,
        TrainSchedule,
    )

_NAMES = {
    "errors": ("PartitionError", "PipelineError", "ScheduleError"),
    "executor": ("Pipeline", "pipeline"),
    "_weights": ("parameters_on_meta",),
    "grid": ("PipelineParallelGrid",),
    "huggingface": ("causal_lm_loss", "huggingface_name", "split_causal_lm"),
    "layers": ("LayerSpec", "TiedLayerSpec"),
    "measure": ("Memory", "measure_memory", "measure_run"),
    "module": ("PipelineModule",),
    "partition": ("balanced", "partition_layers", "uniform"),
    "profile": ("profile_layers",),
    "rng": ("layer_seed", "seeded"),
    "schedule": (
        "SCHEDULES",
        "Action",
        "Choice",
        "Costs",
        "Measured",
        "Program",
        "Recv",
        "Schedule",
        "Send",
        "Simulation",
        "Span",
        "Transfer",
        "Verdict",
        "build",
        "check_program",
        "choose",
        "gpipe",
        "inference",
        "interleaved",
        "lower",
        "one_f_one_b",
        "simulate",
        "to_svg",
        "to_text",
        "to_trace",
        "validate",
        "zb_h1",
        "zb_v",
    ),
    "sync": ("GradientSync", "PlainSync"),
    "topology": ("PipeDataParallelTopology", "PipeModelDataParallelTopology", "ProcessTopology"),
    "upstream": (
        "BackwardPass",
        "BufferOpInstruction",
        "DataParallelSchedule",
        "ForwardPass",
        "InferenceSchedule",
        "LoadMicroBatch",
        "OptimizerStep",
        "PipeInstruction",
        "PipeSchedule",
        "RecvActivation",
        "RecvGrad",
        "ReduceGrads",
        "ReduceTiedGrads",
        "SendActivation",
        "SendGrad",
        "TrainSchedule",
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "__version__",
    # errors
    "PartitionError",
    "PipelineError",
    "ScheduleError",
    # executor
    "Pipeline",
    "pipeline",
    # grid
    "PipelineParallelGrid",
    # huggingface
    "causal_lm_loss",
    "huggingface_name",
    "parameters_on_meta",
    "split_causal_lm",
    # layers and module
    "LayerSpec",
    "PipelineModule",
    "TiedLayerSpec",
    # measurements
    "Memory",
    "measure_memory",
    "measure_run",
    # partition
    "balanced",
    "partition_layers",
    "uniform",
    # profile
    "profile_layers",
    # random numbers
    "layer_seed",
    "seeded",
    # schedule
    "SCHEDULES",
    "Action",
    "Choice",
    "Costs",
    "Measured",
    "Program",
    "Recv",
    "Schedule",
    "Send",
    "Simulation",
    "Span",
    "Transfer",
    "Verdict",
    "build",
    "check_program",
    "choose",
    "gpipe",
    "inference",
    "interleaved",
    "lower",
    "one_f_one_b",
    "simulate",
    "to_svg",
    "to_text",
    "to_trace",
    "validate",
    "zb_h1",
    "zb_v",
    # sync
    "GradientSync",
    "PlainSync",
    # topology
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "ProcessTopology",
    # upstream
    "BackwardPass",
    "BufferOpInstruction",
    "DataParallelSchedule",
    "ForwardPass",
    "InferenceSchedule",
    "LoadMicroBatch",
    "OptimizerStep",
    "PipeInstruction",
    "PipeSchedule",
    "RecvActivation",
    "RecvGrad",
    "ReduceGrads",
    "ReduceTiedGrads",
    "SendActivation",
    "SendGrad",
    "TrainSchedule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
