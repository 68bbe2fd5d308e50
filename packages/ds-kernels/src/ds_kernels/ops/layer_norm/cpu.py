"""layer_norm on CPU: one pass over memory in numba; torch's operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.layer_norm import reference

__all__ = ["layer_norm", "layer_norm_backward"]

NUM_PARTIALS = 16
"""The gradients of weight and bias are summed over this many fixed groups of rows: threads do not change their bits."""


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.layer_norm(x, residual, weight, bias, eps)
    from ds_kernels.ops.layer_norm.cpu_numba import forward

    dim = x.shape[-1]
    rows = x.numel() // dim
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    scale = torch.ones(dim) if weight is None else weight.float()
    shift = torch.zeros(dim) if bias is None else bias.float()
    launch(
        forward, x, 0 if residual is None else residual, scale, shift, y, total, mean, rstd, rows, dim, code,
        float(eps), items=rows, grain=max(1, (1 << 14) // dim),
    )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.layer_norm_backward(grad, grad_total, x, weight, mean, rstd)
    from ds_kernels.ops.layer_norm.cpu_numba import backward

    dim = x.shape[-1]
    rows = x.numel() // dim
    scale = torch.ones(dim) if weight is None else weight.float()
    grad_x, partial = torch.empty_like(x), torch.empty(2, NUM_PARTIALS, dim)
    launch(
        backward, grad, 0 if grad_total is None else grad_total, x, scale, mean, rstd, grad_x, partial, rows, dim,
        code, items=NUM_PARTIALS,
    )  # fmt: skip
    grad_weight, grad_bias = partial[0].sum(0), partial[1].sum(0)
    return grad_x, grad_weight, grad_bias
