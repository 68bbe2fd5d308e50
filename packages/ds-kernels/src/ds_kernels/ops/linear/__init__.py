"""Linear layers with bf16, int8 and int4 weights."""

from __future__ import annotations

from ds_kernels.ops.linear.op import bind_linear, linear
from ds_kernels.ops.linear.weight import QuantizedWeight, quantize_weight

__all__ = ["QuantizedWeight", "bind_linear", "linear", "quantize_weight"]
