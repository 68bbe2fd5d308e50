"""Inference and serving of PyTorch models that do not fit one device.

Serving, the half that plans and needs no torch: requests (`SamplingParams`, `Request`), the blocks of a paged cache
(`BlockManager`) and continuous batching (`Scheduler`); `sample` draws their tokens. Tensor parallelism as a plan
(`plan_tensor_parallel`), pure too, and what reads only a rank's part of each tensor from a checkpoint
(`open_checkpoint`). The configuration of `init_inference` (`DeepSpeedInferenceConfig`, `resolve_config`). Names are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_inference.__about__ import __version__

if TYPE_CHECKING:
    from ds_inference.config import DeepSpeedInferenceConfig, default_inference_config, resolve_config
    from ds_inference.decoder import Batch, Decoder, KVCache, read_decoder
    from ds_inference.engine import InferenceEngine
    from ds_inference.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        LogitsError,
        ModelError,
        RequestError,
    )
    from ds_inference.initialize import init_inference
    from ds_inference.loader import Checkpoint, open_checkpoint
    from ds_inference.quantization import QuantizationSpec, QuantizedLinear, WeightFormat, quantize_model
    from ds_inference.serve.async_engine import AsyncLLM, JobStream
    from ds_inference.serve.blocks import BlockManager
    from ds_inference.serve.core import ServingCore, ServingStats
    from ds_inference.serve.llm import LLM
    from ds_inference.serve.options import ServingOptions
    from ds_inference.serve.outputs import Completion, Delta, RequestOutput, Timing
    from ds_inference.serve.request import Request, RequestState, SamplingParams
    from ds_inference.serve.sampler import Sampled, SampleRow, sample
    from ds_inference.serve.scheduler import Progress, Scheduler, SchedulerLimits, StepPlan, Work
    from ds_inference.tp.applied import AppliedPlan
    from ds_inference.tp.apply import apply_tensor_parallel, plan_model
    from ds_inference.tp.plan import Entry, ModelFacts, ModuleInfo, Rule, TensorParallelPlan, plan_tensor_parallel

_NAMES = {
    "config": ("DeepSpeedInferenceConfig", "default_inference_config", "resolve_config"),
    "decoder": ("Batch", "Decoder", "KVCache", "read_decoder"),
    "engine": ("InferenceEngine",),
    "errors": ("CapacityError", "CheckpointError", "ConfigError", "LogitsError", "ModelError", "RequestError"),
    "initialize": ("init_inference",),
    "loader": ("Checkpoint", "open_checkpoint"),
    "quantization": ("QuantizationSpec", "QuantizedLinear", "WeightFormat", "quantize_model"),
    "serve.async_engine": ("AsyncLLM", "JobStream"),
    "serve.blocks": ("BlockManager",),
    "serve.core": ("ServingCore", "ServingStats"),
    "serve.llm": ("LLM",),
    "serve.options": ("ServingOptions",),
    "serve.outputs": ("Completion", "Delta", "RequestOutput", "Timing"),
    "serve.request": ("Request", "RequestState", "SamplingParams"),
    "serve.sampler": ("SampleRow", "Sampled", "sample"),
    "serve.scheduler": ("Progress", "Scheduler", "SchedulerLimits", "StepPlan", "Work"),
    "tp.applied": ("AppliedPlan",),
    "tp.apply": ("apply_tensor_parallel", "plan_model"),
    "tp.plan": ("Entry", "ModelFacts", "ModuleInfo", "Rule", "TensorParallelPlan", "plan_tensor_parallel"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "__version__",
    # the engine
    "InferenceEngine",
    "init_inference",
    # quantisation
    "QuantizationSpec",
    "QuantizedLinear",
    "WeightFormat",
    "quantize_model",
    # configuration
    "DeepSpeedInferenceConfig",
    "default_inference_config",
    "resolve_config",
    # errors
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "LogitsError",
    "ModelError",
    "RequestError",
    # decoders: a causal language model over a key/value cache
    "Batch",
    "Decoder",
    "KVCache",
    "read_decoder",
    # checkpoints
    "Checkpoint",
    "open_checkpoint",
    # serving
    "AsyncLLM",
    "Completion",
    "Delta",
    "JobStream",
    "LLM",
    "RequestOutput",
    "ServingCore",
    "ServingOptions",
    "ServingStats",
    "Timing",
    # serving: requests, blocks, scheduler, sampler
    "BlockManager",
    "Progress",
    "Request",
    "RequestState",
    "SampleRow",
    "Sampled",
    "SamplingParams",
    "Scheduler",
    "SchedulerLimits",
    "StepPlan",
    "Work",
    "sample",
    # tensor parallelism
    "AppliedPlan",
    "Entry",
    "ModelFacts",
    "ModuleInfo",
    "Rule",
    "TensorParallelPlan",
    "apply_tensor_parallel",
    "plan_model",
    "plan_tensor_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
