"""deepspeed: train and serve PyTorch models that do not fit one device.

    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    loss = engine(batch)
    engine.backward(loss)
    engine.step()

Every name below is imported on first use, so `import deepspeed` itself imports nothing, torch included. Names and
modules that DeepSpeed has and this release has not are listed in `_absent`; using one says what replaces it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from deepspeed.__about__ import __version__
from deepspeed._lazy import AbsentModules, FunctionsOverModules, attach

if TYPE_CHECKING:
    from deepspeed import (
        accelerator,
        checkpoint,
        comm,
        events,
        git_version_info,
        inference,
        launcher,
        module_inject,
        monitor,
        ops,
        pipe,
        planner,
        profiling,
        runtime,
        sequence,
        utils,
    )
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import init_distributed
    from deepspeed.dataloader import DeepSpeedDataLoader
    from deepspeed.engine import DeepSpeedEngine
    from deepspeed.errors import DeepSpeedConfigError
    from deepspeed.hybrid import DeepSpeedHybridEngine
    from deepspeed.initialize import add_config_arguments, initialize
    from deepspeed.lr_arguments import add_tuning_arguments
    from deepspeed.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
    from deepspeed.optimizers import set_optimizer_flags
    from deepspeed.pipeline_engine import PipelineEngine
    from deepspeed.runtime import zero
    from deepspeed.runtime.activation_checkpointing import checkpointing
    from deepspeed.runtime.base_optimizer import (
        DeepSpeedOptimizer,
        DeepSpeedOptimizerCallable,
        DeepSpeedSchedulerCallable,
        ZeROOptimizer,
    )
    from deepspeed.runtime.compiler import is_compile_supported
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.tensor_parallel import set_autotp_mode, tp_model_init
    from deepspeed.utils.init_on_device import OnDevice
    from deepspeed.utils.logging import log_dist, logger
    from ds_inference import DeepSpeedInferenceConfig, InferenceEngine, default_inference_config, init_inference
    from ds_inference.inject import replace_transformer_layer, revert_transformer_layer
    from ds_pipe import PipelineModule

    HAS_TRITON: bool
    dist: Any

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
ADAM_OPTIMIZER = "adam"
LAMB_OPTIMIZER = "lamb"
MUON_OPTIMIZER = "muon"

__version_major__, __version_minor__, __version_patch__ = (int(part) for part in __version__.split(".")[:3])
__git_hash__ = "unknown"
__git_branch__ = "unknown"

_NAMES = {
    "DeepSpeedConfig": "deepspeed.runtime.config:DeepSpeedConfig",
    "DeepSpeedConfigError": "deepspeed.errors:DeepSpeedConfigError",
    "DeepSpeedDataLoader": "deepspeed.dataloader:DeepSpeedDataLoader",
    "DeepSpeedEngine": "deepspeed.engine:DeepSpeedEngine",
    "DeepSpeedHybridEngine": "deepspeed.hybrid.engine:DeepSpeedHybridEngine",
    "DeepSpeedInferenceConfig": "ds_inference.config:DeepSpeedInferenceConfig",
    "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizer",
    "DeepSpeedOptimizerCallable": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizerCallable",
    "DeepSpeedSchedulerCallable": "deepspeed.runtime.base_optimizer:DeepSpeedSchedulerCallable",
    "DeepSpeedTransformerConfig": "deepspeed.ops.transformer:DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer": "deepspeed.ops.transformer:DeepSpeedTransformerLayer",
    "InferenceEngine": "ds_inference.engine:InferenceEngine",
    "PipelineEngine": "deepspeed.pipeline_engine:PipelineEngine",
    "PipelineModule": "ds_pipe.module:PipelineModule",
    "OnDevice": "deepspeed.utils.init_on_device:OnDevice",
    "ZeROOptimizer": "deepspeed.runtime.base_optimizer:ZeROOptimizer",
    "add_config_arguments": "deepspeed.initialize:add_config_arguments",
    "add_tuning_arguments": "deepspeed.lr_arguments:add_tuning_arguments",
    "checkpointing": "deepspeed.runtime.activation_checkpointing.checkpointing",
    "default_inference_config": "ds_inference.config:default_inference_config",
    "get_accelerator": "deepspeed.accelerator.real_accelerator:get_accelerator",
    "init_distributed": "deepspeed.comm.comm:init_distributed",
    "init_inference": "ds_inference.initialize:init_inference",
    "initialize": "deepspeed.initialize:initialize",
    "is_compile_supported": "deepspeed.runtime.compiler:is_compile_supported",
    "log_dist": "deepspeed.utils.logging:log_dist",
    "logger": "deepspeed.utils.logging:logger",
    "replace_transformer_layer": "ds_inference.inject:replace_transformer_layer",
    "revert_transformer_layer": "ds_inference.inject:revert_transformer_layer",
    "set_autotp_mode": "deepspeed.tensor_parallel:set_autotp_mode",
    "set_optimizer_flags": "deepspeed.optimizers:set_optimizer_flags",
    "tp_model_init": "deepspeed.tensor_parallel:tp_model_init",
    "zero": "deepspeed.runtime.zero",
}
_SUBMODULES = (
    "accelerator",
    "checkpoint",
    "comm",
    "events",
    "git_version_info",
    "inference",
    "launcher",
    "module_inject",
    "monitor",
    "ops",
    "pipe",
    "planner",
    "profiling",
    "runtime",
    "sequence",
    "utils",
)
_get, __dir__ = attach(__name__, _NAMES, _SUBMODULES)
if not any(isinstance(finder, AbsentModules) for finder in sys.meta_path):
    sys.meta_path.append(AbsentModules())


def __getattr__(name: str) -> Any:
    if name == "HAS_TRITON":
        from importlib.util import find_spec

        return find_spec("triton") is not None
    if name == "dist":  # None until communication is initialised, then deepspeed.comm; hence never cached
        comm = sys.modules.get("deepspeed.comm")
        return comm if comm is not None and comm.is_initialized() else None
    return _get(name)


sys.modules[__name__].__class__ = FunctionsOverModules

__all__ = [
    "ADAM_OPTIMIZER",
    "HAS_TRITON",
    "LAMB_OPTIMIZER",
    "MUON_OPTIMIZER",
    "TORCH_DISTRIBUTED_DEFAULT_PORT",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedDataLoader",
    "DeepSpeedEngine",
    "DeepSpeedHybridEngine",
    "DeepSpeedInferenceConfig",
    "DeepSpeedOptimizer",
    "DeepSpeedOptimizerCallable",
    "DeepSpeedSchedulerCallable",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "InferenceEngine",
    "OnDevice",
    "PipelineEngine",
    "PipelineModule",
    "ZeROOptimizer",
    "__git_branch__",
    "__git_hash__",
    "__version__",
    "__version_major__",
    "__version_minor__",
    "__version_patch__",
    "accelerator",
    "add_config_arguments",
    "add_tuning_arguments",
    "checkpoint",
    "checkpointing",
    "comm",
    "default_inference_config",
    "dist",
    "events",
    "get_accelerator",
    "git_version_info",
    "init_distributed",
    "inference",
    "init_inference",
    "initialize",
    "is_compile_supported",
    "launcher",
    "log_dist",
    "logger",
    "module_inject",
    "monitor",
    "ops",
    "pipe",
    "planner",
    "profiling",
    "replace_transformer_layer",
    "revert_transformer_layer",
    "runtime",
    "sequence",
    "set_autotp_mode",
    "set_optimizer_flags",
    "tp_model_init",
    "utils",
    "zero",
]
