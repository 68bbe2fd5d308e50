"""The specification of bias_gelu: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

from torch import Tensor

from ds_kernels._reference import column_sum, wide
from ds_kernels.ops.glu.reference import activation

__all__ = ["bias_gelu", "bias_gelu_backward"]


def bias_gelu(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """gelu(x + bias), rounded once to x's dtype; kind as in `glu.reference`."""
    rows = wide(x) if bias is None else wide(x) + wide(bias)
    return activation(rows, kind)[0].to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """`(grad_x, grad_bias)`: grad * gelu'(x + bias), and its sum over the rows, fp32 (fp64 for fp64)."""
    rows = wide(x) if bias is None else wide(x) + wide(bias)
    grad_x = wide(grad) * activation(rows, kind)[1]
    return grad_x.to(x.dtype), column_sum(grad_x)
