"""bias_dropout_residual on CPU: one pass over memory in numba; torch's operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.bias_dropout_residual import reference

__all__ = ["bias_dropout_residual", "bias_dropout_residual_backward"]

NUM_PARTIALS = 16
"""The bias's gradient is summed over this many fixed groups of rows, so that threads do not change its bits."""


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.bias_dropout_residual(x, bias, residual, seed, p)
    from ds_kernels.ops.bias_dropout_residual.cpu_numba import forward

    out, dim = torch.empty_like(x), x.shape[-1]
    shift = torch.zeros(dim) if bias is None else bias.float()
    launch(
        forward, x, shift, 0 if residual is None else residual, seed, out, dim, code, reference.threshold_of(p),
        reference.scale_of(p), items=x.numel() // dim, grain=max(1, (1 << 13) // dim),
    )  # fmt: skip
    return out


def bias_dropout_residual_backward(grad: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(grad.dtype)
    if not HAS_NUMBA or code is None or grad.numel() == 0:
        return reference.bias_dropout_residual_backward(grad, seed, p)
    from ds_kernels.ops.bias_dropout_residual.cpu_numba import backward

    grad_x, dim = torch.empty_like(grad), grad.shape[-1]
    partial = torch.empty(NUM_PARTIALS, dim)
    launch(
        backward, grad, seed, grad_x, partial, grad.numel() // dim, dim, code, reference.threshold_of(p),
        reference.scale_of(p), items=NUM_PARTIALS,
    )  # fmt: skip
    return grad_x, partial.sum(0)
