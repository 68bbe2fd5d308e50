"""The specification of softmax: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._reference import wide

__all__ = ["softmax", "softmax_backward"]


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """exp(s) / sum(exp(s)) over the last dimension of s = scale * x + mask; rows with nothing but -inf give zeros.

    A boolean mask says where to look: False is -inf. With causal, row i of the last two dimensions [rows, cols] looks
    at columns up to i + cols - rows.
    """
    scores = wide(x) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        rows, cols = x.shape[-2:]
        seen = torch.ones(rows, cols, dtype=torch.bool, device=x.device).tril(cols - rows)
        scores = scores.masked_fill(~seen, -torch.inf)
    if x.numel() == 0:
        return torch.empty_like(x)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0).to(x.dtype)


def softmax_backward(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    """scale * y * (grad - sum(grad * y)), from the result of forward; causal says where y is 0 (no need to know it)."""
    probabilities, grad = wide(y), wide(grad)
    inner = (grad * probabilities).sum(-1, keepdim=True)
    return (scale * probabilities * (grad - inner)).to(y.dtype)
