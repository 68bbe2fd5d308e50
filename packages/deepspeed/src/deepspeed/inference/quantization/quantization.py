"""Upstream's verb for ZeRO-Inference's quantisation after a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_inference import quantize_model
from ds_inference.quantization import spec_of_patterns

__all__ = ["_init_group_wise_weight_quantization"]


def _init_group_wise_weight_quantization(model: nn.Module, ds_config: Mapping[str, Any]) -> nn.Module:
    """Quantise the linear layers that `weight_quantization.post_init_quant` names, in place.

    Args:
        model: any module, its weights loaded and not sharded.
        ds_config: {"weight_quantization": {"post_init_quant": {part of a module's name: {"num_bits": 4 or 8,
            "group_size": 64, "group_dim": 1, "symmetric": False}}}}.

    Returns:
        The model, the same object.

    Raises:
        ValueError: no such section, a bad value in it, or nothing in the model that it names.
    """
    section = ds_config.get("weight_quantization")
    patterns = section.get("post_init_quant") if isinstance(section, Mapping) else None
    if not patterns:
        raise ValueError(
            "ds_config has no weight_quantization.post_init_quant; expected {part of a module's name: {num_bits, "
            "group_size, group_dim, symmetric}}"
        )
    quantize_model(model, spec_of_patterns(patterns))
    return model
