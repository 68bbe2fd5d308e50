"""From the model that a script has to the one that the engine runs: the steps of `init_inference`, in order.

    tensor parallelism -> weights from a checkpoint -> dtype and device -> injected kernels, or quantised layers

Invariants: what the configuration asks for is done, or refused with a sentence, or said in a log line; a step that
fails leaves an error that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ds_comm
from ds_comm.device import current_device, device_type
from ds_comm.log import get_logger
from ds_inference.checkpoints import load_into, save_shards
from ds_inference.config import DeepSpeedInferenceConfig
from ds_inference.errors import ConfigError, ModelError
from ds_inference.inject import Injection, inject
from ds_inference.quantization import QuantizationSpec, quantize_model, spec_of_config
from ds_inference.tp.applied import AppliedPlan
from ds_inference.tp.apply import apply_tensor_parallel

__all__ = ["Prepared", "check_supported", "prepare"]

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
    graphs = "decoding is not recorded as graphs" if on_gpu else "there is no CUDA device, and decoding is one program"
    triton = "kernels are Triton's on GPUs anyway" if on_gpu else "on a CPU kernels are numba's and torch's"
    no_effect = {
        "enable_cuda_graph": config.enable_cuda_graph and graphs,
        "use_triton": config.use_triton and triton,
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


@dataclass(frozen=True)
class Prepared:
    """What the engine runs, and how it came to be so."""

    injection: Injection | None = None
    applied: AppliedPlan | None = None


def prepare(model: nn.Module, config: DeepSpeedInferenceConfig, quantization: QuantizationSpec | None) -> Prepared:
    """Carry out the configuration on `model`, in place. Collective with tensor parallelism."""
    spec = quantization or spec_of_config(config)
    check_policy(model, config.injection_policy)
    checkpoint = config.checkpoint if config.checkpoint is not None else config.checkpoint_config.checkpoint_dir
    if checkpoint is None and _on_meta(model):
        raise ModelError(
            f"{type(model).__name__} has weights on the meta device; give their place with checkpoint=..., a folder of "
            "safetensors files"
        )
    dtype, device = _target(config)
    applied = _split(model, config)
    if checkpoint is not None:
        base = config.base_dir or config.checkpoint_config.base_dir or ""
        load_into(model, checkpoint, base_dir=base, applied=applied, dtype=dtype, device=device)
    _cast(model, dtype, device)
    if folder := config.save_mp_checkpoint_path or config.checkpoint_config.save_mp_checkpoint_path:
        save_shards(model, folder, applied)
    if config.replace_with_kernel_inject:
        return Prepared(inject(model, spec), applied)
    if spec is not None:
        names = quantize_model(model, spec)
        logger.info("%d linear layers of %s are quantised", len(names), type(model).__name__)
    return Prepared(None, applied)


def _on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _split(model: nn.Module, config: DeepSpeedInferenceConfig) -> AppliedPlan | None:
    """Tensor parallelism over the group that is given, or over the ranks in order."""
    section = config.tensor_parallel
    group = _given_group(config)
    if not section.enabled or (section.tp_size == 1 and group is None):
        return None
    ds_comm.init_distributed()
    world = ds_comm.get_world_size()
    if group is not None:
        size = ds_comm.get_world_size(group)
        if "tp_size" in section.model_fields_set and section.tp_size not in (1, size):
            raise ConfigError(f"tensor_parallel.tp_size is {section.tp_size}, and the group given has {size} ranks")
    elif world % section.tp_size:
        raise ConfigError(
            f"tensor_parallel.tp_size is {section.tp_size}, and there are {world} ranks; start a multiple of it, with "
            "deepspeed --num_gpus or torchrun"
        )
    elif section.tp_size < world:
        groups = [
            ds_comm.new_group(list(range(first, first + section.tp_size))) for first in range(0, world, section.tp_size)
        ]
        group = groups[ds_comm.get_rank() // section.tp_size]
    applied = apply_tensor_parallel(
        model, group=group, grain=section.tp_grain_size, injection_policy=config.injection_policy
    )
    return applied if applied.size > 1 else None


def _given_group(config: DeepSpeedInferenceConfig) -> Any:
    section = config.tensor_parallel
    if section.tp_group is not None or section.mpu is None:
        return section.tp_group
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        if (getter := getattr(section.mpu, name, None)) is not None:
            return getter()
    raise ConfigError(
        f"tensor_parallel.mpu is a {type(section.mpu).__name__} without get_model_parallel_group; give tp_group instead"
    )


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


def _target(config: DeepSpeedInferenceConfig) -> tuple[torch.dtype | None, torch.device | None]:
    """Where the model goes and as what; None: it stays."""
    dtype = None if config.dtype == torch.int8 else config.dtype
    if dtype == torch.float16 and device_type() == "cpu":
        logger.warning("dtype is float16, the default; on a CPU bfloat16 and float32 are much faster: give dtype=...")
    return dtype, None if config.keep_module_on_host else current_device()


def _cast(model: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Move and cast in place. Rotary frequencies stay as exact as they are: rounded, they would turn far positions."""
    frequencies = {
        (module, name): value
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and name.endswith("inv_freq")
    }
    model.to(device=device, dtype=dtype)
    for (module, name), value in frequencies.items():
        module._buffers[name] = value.to(device=device)
