"""Kernels for PyTorch, each with a plain-torch reference as its specification.

Operations (`ops`), optimizers (`optim`), layers (`nn`, `transformer`) and `apply_kernels`, which puts them into
Hugging Face models. Triton on GPUs; on CPU torch's fused operations, and numba where those are slower (extra
`ds-kernels[cpu]`). Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_kernels.__about__ import __version__

if TYPE_CHECKING:
    from ds_kernels._dispatch import BACKENDS, HAS_TRITON, available_backends, use_backend
    from ds_kernels.errors import BackendError, KernelArgumentError, PatchError
    from ds_kernels.ops.bias_dropout_residual import bias_dropout_residual
    from ds_kernels.ops.bias_gelu import bias_gelu
    from ds_kernels.ops.cross_entropy import cross_entropy
    from ds_kernels.ops.decode import (
        DecodeLayer,
        DecodeModel,
        DecodeProgram,
        Norm,
        Projection,
        RopeTable,
        bind_decode,
        decode,
    )
    from ds_kernels.ops.flash_attention import flash_attention
    from ds_kernels.ops.glu import geglu, swiglu
    from ds_kernels.ops.grouped_gemm import grouped_gemm
    from ds_kernels.ops.layer_norm import layer_norm
    from ds_kernels.ops.linear import QuantizedWeight, bind_linear, linear, quantize_weight
    from ds_kernels.ops.linear_cross_entropy import linear_cross_entropy
    from ds_kernels.ops.moe_dispatch import moe_combine, moe_dispatch
    from ds_kernels.ops.moe_gating import Routing, moe_capacity, moe_gate
    from ds_kernels.ops.paged_attention import paged_attention, write_kv
    from ds_kernels.ops.quantize import Quantized, quantize
    from ds_kernels.ops.rms_norm import rms_norm
    from ds_kernels.ops.rope import rope
    from ds_kernels.ops.softmax import softmax
    from ds_kernels.patch import Applied, apply_kernels
    from ds_kernels.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

_NAMES = {
    "_dispatch": ("BACKENDS", "HAS_TRITON", "available_backends", "use_backend"),
    "errors": ("BackendError", "KernelArgumentError", "PatchError"),
    "ops.bias_dropout_residual": ("bias_dropout_residual",),
    "ops.bias_gelu": ("bias_gelu",),
    "ops.cross_entropy": ("cross_entropy",),
    "ops.decode": (
        "DecodeLayer",
        "DecodeModel",
        "DecodeProgram",
        "Norm",
        "Projection",
        "RopeTable",
        "bind_decode",
        "decode",
    ),
    "ops.flash_attention": ("flash_attention",),
    "ops.glu": ("geglu", "swiglu"),
    "ops.grouped_gemm": ("grouped_gemm",),
    "ops.layer_norm": ("layer_norm",),
    "ops.linear": ("QuantizedWeight", "bind_linear", "linear", "quantize_weight"),
    "ops.linear_cross_entropy": ("linear_cross_entropy",),
    "ops.moe_dispatch": ("moe_combine", "moe_dispatch"),
    "ops.moe_gating": ("Routing", "moe_capacity", "moe_gate"),
    "ops.paged_attention": ("paged_attention", "write_kv"),
    "ops.quantize": ("Quantized", "quantize"),
    "ops.rms_norm": ("rms_norm",),
    "ops.rope": ("rope",),
    "ops.softmax": ("softmax",),
    "patch": ("Applied", "apply_kernels"),
    "transformer": ("DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "Applied",
    "BackendError",
    "DecodeLayer",
    "DecodeModel",
    "DecodeProgram",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "KernelArgumentError",
    "Norm",
    "PatchError",
    "Projection",
    "Quantized",
    "QuantizedWeight",
    "RopeTable",
    "Routing",
    "__version__",
    "apply_kernels",
    "available_backends",
    "bias_dropout_residual",
    "bias_gelu",
    "bind_decode",
    "bind_linear",
    "cross_entropy",
    "decode",
    "flash_attention",
    "geglu",
    "grouped_gemm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe_capacity",
    "moe_combine",
    "moe_dispatch",
    "moe_gate",
    "paged_attention",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "use_backend",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
