"""The specification of rms_norm: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._reference import column_sum, wide

__all__ = ["rms_norm", "rms_norm_backward"]


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, total, rstd)`: y = total * rstd * (offset + weight), rstd = 1 / sqrt(mean(total^2) + eps), last dimension.

    total = x + residual, rounded to x's dtype before it is normalised; without a residual x is normalised and total
    is empty. y has x's dtype, rstd is fp32 (fp64 for fp64) of shape x.shape[:-1].
    """
    total = x.new_empty(0)
    if residual is not None:
        x = total = (wide(x) + wide(residual)).to(x.dtype)
    rows = wide(x)
    rstd = torch.rsqrt(rows.square().mean(-1) + eps)
    y = rows * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (offset + wide(weight))
    return y.to(x.dtype), total, rstd


def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """`(grad_x, grad_weight)` for the x that was normalised, from its saved rstd; grad_weight is empty without weight.

    With g = grad * (offset + weight): grad_x = rstd * (g - x * rstd^2 * mean(g * x)) + grad_total.
    """
    rows, grad = wide(x), wide(grad)
    rstd = rstd.unsqueeze(-1)
    scaled = grad if weight is None else grad * (offset + wide(weight))
    grad_x = rstd * (scaled - rows * rstd.square() * (scaled * rows).mean(-1, keepdim=True))
    if grad_total is not None:
        grad_x = grad_x + wide(grad_total)
    if weight is None:
        return grad_x.to(x.dtype), grad.new_empty(0)
    return grad_x.to(x.dtype), column_sum(grad * rows * rstd).to(weight.dtype)
