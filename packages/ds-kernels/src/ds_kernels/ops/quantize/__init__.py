"""Block-wise quantisation of tensors."""

from __future__ import annotations

from ds_kernels.ops.quantize.op import FORMATS, Quantized, quantize

__all__ = ["FORMATS", "Quantized", "quantize"]
