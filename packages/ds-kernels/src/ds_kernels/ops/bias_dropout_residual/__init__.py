"""A bias, dropout and a residual in one pass."""

from __future__ import annotations

from ds_kernels.ops.bias_dropout_residual.op import bias_dropout_residual

__all__ = ["bias_dropout_residual"]
