"""rms_norm on CPU: one pass over memory in numba; torch's row operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.rms_norm import reference

__all__ = ["rms_norm", "rms_norm_backward"]

NUM_PARTIALS = 16
"""The weight's gradient is summed over this many fixed groups of rows, so that threads do not change its bits."""


def _code(x: Tensor) -> int | None:
    return CODES.get(x.dtype) if HAS_NUMBA and x.numel() else None


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    code = _code(x)
    if code is None:
        return reference.rms_norm(x, residual, weight, eps, offset)
    from ds_kernels.ops.rms_norm.cpu_numba import forward

    dim = x.shape[-1]
    rows = x.numel() // dim
    scale = torch.ones(dim) if weight is None else offset + weight.float()
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    launch(
        forward, x, 0 if residual is None else residual, scale, y, total, rstd, rows, dim, code, float(eps),
        items=rows, grain=_grain(dim),
    )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    code = _code(x)
    if code is None:
        return reference.rms_norm_backward(grad, grad_total, x, weight, rstd, offset)
    from ds_kernels.ops.rms_norm.cpu_numba import backward

    dim = x.shape[-1]
    rows = x.numel() // dim
    scale = torch.ones(dim) if weight is None else offset + weight.float()
    grad_x, partial = torch.empty_like(x), torch.empty(NUM_PARTIALS, dim)
    launch(
        backward, grad, 0 if grad_total is None else grad_total, x, scale, rstd, grad_x, partial, rows, dim, code,
        items=NUM_PARTIALS,
    )  # fmt: skip
    return grad_x, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def _grain(dim: int) -> int:
    """Rows handed out at a time: about 16K elements, some microseconds of work."""
    return max(1, (1 << 14) // dim)
