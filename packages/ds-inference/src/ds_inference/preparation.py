"""From the model that a script has to the one that the engine runs: the steps of `init_inference`, in order.

    weights from a checkpoint -> tensor parallelism -> dtype and device -> injected kernels, or quantised layers

Invariants: what the configuration asks for is done, or refused with a sentence, or said in a log line; a step that
fails leaves an error that names the key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_comm.device import current_device, device_type
from ds_comm.log import get_logger
from ds_inference.config import DeepSpeedInferenceConfig
from ds_inference.errors import ConfigError, ModelError
from ds_inference.inject import Injection, inject
from ds_inference.quantization import QuantizationSpec, quantize_model, spec_of_config

__all__ = ["check_supported", "prepare"]

logger = get_logger(__name__)


def check_supported(config: DeepSpeedInferenceConfig) -> None:
    """ConfigError for what is not done; a log line for what has no effect here."""
    moe = config.moe
    if moe.enabled and (moe.ep_size != 1 or moe.ep_group is not None or moe.ep_mp_group is not None):
        raise ConfigError(
            f"moe.ep_size is {moe.ep_size}: experts are not spread over ranks of their own here; leave moe.ep_size and "
            "its groups out (tensor_parallel splits experts as well)"
        )
    if stage := config.zero.get("stage", 0):
        raise ConfigError(
            f"zero.stage is {stage}: sharded weights in inference go through deepspeed.initialize with "
            "zero_optimization.stage 3 and engine.eval(); leave zero out of the inference configuration"
        )
    if not config.triangular_masking:
        raise ConfigError("triangular_masking is off: whether attention is causal is the model's own; leave it out")
    on_gpu = device_type() == "cuda"
    no_effect = {
        "enable_cuda_graph": config.enable_cuda_graph and not on_gpu and "there is no CUDA device",
        "use_triton": config.use_triton and not on_gpu and "there is no CUDA device; kernels are numba's and torch's",
        "triton_autotune": config.triton_autotune and "the kernels have fixed tiles",
        "transposed_mode": config.transposed_mode and "layouts of weights are found out by themselves",
        "return_tuple": not config.return_tuple and "modules return what they did before",
        "injection_policy_tuple": config.injection_policy_tuple is not None
        and "it is upstream's own; injection_policy",
        "training_mp_size": config.training_mp_size != 1 and "checkpoints are read by names and shapes",
    }
    for key, reason in no_effect.items():
        if reason:
            logger.warning("%s has no effect: %s", key, reason)


def prepare(
    model: nn.Module, config: DeepSpeedInferenceConfig, quantization: QuantizationSpec | None
) -> tuple[nn.Module, Injection | None]:
    """Carry out the configuration on `model`, in place; the model and what was injected."""
    spec = quantization or spec_of_config(config)
    check_policy(model, config.injection_policy)
    _cast(model, config)
    if config.replace_with_kernel_inject:
        return model, inject(model, spec)
    if spec is not None:
        names = quantize_model(model, spec)
        logger.info("%d linear layers of %s are quantised", len(names), type(model).__name__)
    return model, None


def check_policy(model: nn.Module, policy: dict[Any, Any] | None) -> list[str]:
    """The row-parallel linear layers that an injection policy names; ConfigError for what the model does not have."""
    found = []
    for kind, names in (policy or {}).items():
        blocks = [
            (name, module)
            for name, module in model.named_modules()
            if (isinstance(module, kind) if isinstance(kind, type) else type(module).__name__ == kind)
        ]
        shown = getattr(kind, "__name__", kind)
        if not blocks:
            raise ConfigError(f"injection_policy names {shown}, and {type(model).__name__} has no module of that class")
        for one in (names,) if isinstance(names, str) else names:
            for name, block in blocks:
                try:
                    block.get_submodule(one)
                except AttributeError:
                    raise ConfigError(
                        f"injection_policy: {name or shown} has no module {one!r}; give the path of a linear layer"
                    ) from None
                found.append(f"{name}.{one}" if name else one)
    return found


def _cast(model: nn.Module, config: DeepSpeedInferenceConfig) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            f"{type(model).__name__} has weights on the meta device; give their place with checkpoint=..., a folder of "
            "safetensors files"
        )
    dtype = None if config.dtype == torch.int8 else config.dtype
    if dtype == torch.float16 and device_type() == "cpu":
        logger.warning("dtype is float16, the default; on a CPU bfloat16 and float32 are much faster: give dtype=...")
    device = None if config.keep_module_on_host else current_device()
    model.to(device=device, dtype=dtype)
