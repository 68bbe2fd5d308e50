"""bias_gelu on CPU: one pass over memory in numba; torch's operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.bias_gelu import reference

__all__ = ["bias_gelu", "bias_gelu_backward"]

NUM_PARTIALS = 16
"""The bias's gradient is summed over this many fixed groups of rows, so that threads do not change its bits."""


def bias_gelu(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.bias_gelu(x, bias, kind)
    from ds_kernels.ops.bias_gelu.cpu_numba import forward

    y, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    shift = torch.zeros(dim) if bias is None else bias.float()
    launch(forward, x, shift, y, dim, code, kind, items=rows, grain=max(1, (1 << 13) // dim))
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.bias_gelu_backward(grad, x, bias, kind)
    from ds_kernels.ops.bias_gelu.cpu_numba import backward

    grad_x, dim = torch.empty_like(x), x.shape[-1]
    shift = torch.zeros(dim) if bias is None else bias.float()
    partial = torch.empty(NUM_PARTIALS, dim)
    launch(
        backward, grad, x, shift, grad_x, partial, x.numel() // dim, dim, code, kind, items=NUM_PARTIALS
    )  # fmt: skip
    return grad_x, partial.sum(0)
