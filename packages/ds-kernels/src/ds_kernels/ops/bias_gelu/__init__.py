"""A bias and gelu in one pass."""

from __future__ import annotations

from ds_kernels.ops.bias_gelu.op import bias_gelu

__all__ = ["bias_gelu"]
