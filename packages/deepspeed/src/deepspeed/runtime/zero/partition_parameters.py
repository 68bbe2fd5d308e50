"""Upstream's path of zero.Init and its companions, with upstream's signature of `Init`.

transformers replaces `zero_wrapper_for_fp_tensor_constructor` here before it enters `zero.Init`, to keep
`torch.arange` from returning half precision. Our Init never overrides tensor constructors (parameters are built in the
dtype their module asks for and cast when they are sharded), so the damage that the replacement prevents cannot
happen; the names exist for the replacement to find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ds_zero
from deepspeed._lazy import explain_absent
from deepspeed.accelerator import get_accelerator
from deepspeed.config import parse_config
from ds_zero import (
    GatheredParameters,
    ZeroParamStatus,
    ZeroParamType,
    register_external_parameter,
    unregister_external_parameter,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "get_accelerator",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: Any = None
) -> Callable[..., torch.Tensor]:
    """`fn` with floating results cast to `target_fp_dtype` on `target_device`."""

    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if target_device is not None:
            kwargs.setdefault("device", target_device)
        tensor = fn(*args, **kwargs)
        return tensor.to(target_fp_dtype) if tensor.is_floating_point() else tensor

    return construct


class Init(ds_zero.Init):
    """`ds_zero.Init` with upstream's arguments; those about memory placement have nothing to do on one device."""

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        given = config_dict_or_path if config_dict_or_path is not None else config
        parsed = parse_config(given) if given is not None else None
        if parsed is not None and dtype is None:
            dtype = torch.bfloat16 if parsed.bf16.enabled else torch.float16 if parsed.fp16.enabled else None
        group = sequence_data_parallel_group or data_parallel_group
        for kind in ("sequence_data", "data"):  # ranks that share a sequence hold parameters for each other too
            ask = getattr(mpu, f"get_{kind}_parallel_group", None)
            group = ask() if group is None and ask is not None else group
        super().__init__(module, group=group, dtype=dtype, enabled=enabled)


explain_absent(__name__)
