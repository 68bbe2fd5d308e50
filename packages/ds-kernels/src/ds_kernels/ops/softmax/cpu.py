"""softmax on CPU: one pass over memory in numba, masked columns of causal rows not even read; torch's without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.softmax import reference
from ds_kernels.ops.softmax.mask import as_rows

__all__ = ["softmax", "softmax_backward"]

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """As the reference."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or x.numel() == 0:
        return reference.softmax(x, mask, scale, causal)
    from ds_kernels.ops.softmax.cpu_numba import forward

    y, cols = torch.empty_like(x), x.shape[-1]
    rows, strides, kind = x.shape[-2] if x.dim() > 1 else 1, (0, 0, 0), NO_MASK
    inner = x.shape[-3] if x.dim() > 2 else 1
    if mask is not None:
        kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
        mask = mask if kind == BOOLEAN else mask.float()
        mask = as_rows(mask, x)
        strides = (mask.stride(0), mask.stride(1), mask.stride(2))
    items = x.numel() // cols
    launch(
        forward, x, 0 if mask is None else mask, y, rows, inner, cols, code, kind, *strides, int(causal),
        float(scale), items=items, grain=_grain(cols),
    )  # fmt: skip
    return y


def softmax_backward(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    """As the reference."""
    code = CODES.get(y.dtype)
    if not HAS_NUMBA or code is None or y.numel() == 0:
        return reference.softmax_backward(grad, y, scale, causal)
    from ds_kernels.ops.softmax.cpu_numba import backward

    grad_x, cols = torch.empty_like(y), y.shape[-1]
    rows = y.shape[-2] if y.dim() > 1 else 1
    launch(
        backward, grad, y, grad_x, rows, cols, code, int(causal), float(scale), items=y.numel() // cols,
        grain=_grain(cols),
    )  # fmt: skip
    return grad_x


def _grain(cols: int) -> int:
    """Rows handed out at a time: about 16K elements, some microseconds of work."""
    return max(1, (1 << 14) // cols)
