"""The specification of rms_norm: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_backward"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`(y, rstd)`: y = x * rstd * (offset + weight), rstd = 1 / sqrt(mean(x^2) + eps) over the last dimension.

    y has x's dtype, rstd is fp32 (fp64 for fp64) of shape x.shape[:-1].
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (offset + _wide(weight))
    return y.to(x.dtype), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """`(grad_x, grad_weight)` from the saved rstd; grad_weight is empty without a weight.

    With g = grad * (offset + weight): grad_x = rstd * (g - x * rstd^2 * mean(g * x)).
    """
    wide, wide_grad = _wide(x), _wide(grad)
    rstd = rstd.unsqueeze(-1)
    scaled = wide_grad if weight is None else wide_grad * (offset + _wide(weight))
    grad_x = rstd * (scaled - wide * rstd.pow(2) * (scaled * wide).mean(-1, keepdim=True))
    if weight is None:
        return grad_x.to(x.dtype), grad.new_empty(0)
    grad_weight = (wide_grad * wide * rstd).flatten(0, -2).sum(0) if x.dim() > 1 else wide_grad * wide * rstd
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
