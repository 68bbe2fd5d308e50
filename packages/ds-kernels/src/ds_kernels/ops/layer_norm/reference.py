"""The specification of layer_norm: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._reference import column_sum, wide

__all__ = ["layer_norm", "layer_norm_backward"]


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, total, mean, rstd)`: y = (total - mean) * rstd * weight + bias over the last dimension.

    total = x + residual, rounded to x's dtype before it is normalised; without a residual x is normalised and total
    is empty. mean and rstd = 1 / sqrt(variance + eps) are fp32 (fp64 for fp64) of shape x.shape[:-1].
    """
    total = x.new_empty(0)
    if residual is not None:
        x = total = (wide(x) + wide(residual)).to(x.dtype)
    rows = wide(x)
    mean = rows.mean(-1)
    centred = rows - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), total, mean, rstd


def layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`(grad_x, grad_weight, grad_bias)` for the x that was normalised, from its saved mean and rstd.

    With n = (x - mean) * rstd and g = grad * weight: grad_x = rstd * (g - mean(g) - n * mean(g * n)) + grad_total.
    The gradients of weight and bias are fp32 (fp64 for fp64), for the caller to round.
    """
    normal, grad_wide = (wide(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1), wide(grad)
    scaled = grad_wide if weight is None else grad_wide * wide(weight)
    pull = normal * (scaled * normal).mean(-1, keepdim=True)
    grad_x = rstd.unsqueeze(-1) * (scaled - scaled.mean(-1, keepdim=True) - pull)
    if grad_total is not None:
        grad_x = grad_x + wide(grad_total)
    return grad_x.to(x.dtype), column_sum(grad_wide * normal), column_sum(grad_wide)
