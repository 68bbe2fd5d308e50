"""grouped_gemm on CPU: torch's product per group of many rows, one numba launch for all groups of few.

A product of few rows reads the weights and does little else; torch's takes 5 to 8 times as long as the reading there
(it packs bf16 weights anew at every call), the loop in `cpu_numba` runs at memory bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.grouped_gemm import reference

__all__ = ["grouped_gemm", "grouped_gemm_backward"]

FEW_ROWS = 4
"""Groups of up to so many rows go to the numba loop."""
BLOCK = 32
"""Outputs that one work item of it computes."""


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference."""
    if x.dtype == torch.float64 or not x.numel():
        return reference.grouped_gemm(x, weight, ends, bias)
    groups, out, inner = weight.shape
    y = x.new_empty(x.shape[0], out)
    few = HAS_NUMBA and weight.is_contiguous() and bool(inner)
    some_few, last = False, 0
    for group, low, high in reference.ranges(ends):
        last = high
        if few and high - low <= FEW_ROWS:
            some_few = True
        elif bias is None:
            torch.mm(x[low:high], weight[group].t(), out=y[low:high])
        else:
            torch.addmm(bias[group], x[low:high], weight[group].t(), out=y[low:high])
    if some_few and out:
        from ds_kernels.ops.grouped_gemm.cpu_numba import few_rows

        shift = torch.zeros(groups, out) if bias is None else bias.float()
        blocks = -(-out // BLOCK)
        launch(
            few_rows, x.float(), weight, ends.long(), shift.contiguous(), y,
            groups, out, inner, CODES[x.dtype], FEW_ROWS, BLOCK,
            items=groups * blocks, grain=_grain(inner),
        )  # fmt: skip
    y[last:].zero_()
    return y


def grouped_gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, has_bias: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    if x.dtype == torch.float64:
        return reference.grouped_gemm_backward(grad, x, weight, ends, has_bias, need_x, need_weight)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_zeros(weight.shape[:2] if has_bias else (0,))
    low = 0
    for group, high in enumerate(ends.tolist()):
        if need_weight:
            if high > low:
                torch.mm(grad[low:high].t(), x[low:high], out=grad_weight[group])
            else:
                grad_weight[group].zero_()
        if need_x and high > low:
            torch.mm(grad[low:high], weight[group], out=grad_x[low:high])
        if has_bias and high > low:
            torch.sum(grad[low:high], 0, out=grad_bias[group])
        low = high
    if need_x:
        grad_x[low:].zero_()
    return grad_x, grad_weight, grad_bias


def _grain(inner: int) -> int:
    """Blocks of outputs handed out at a time: some 64K weights."""
    return max(1, (1 << 16) // (inner * BLOCK))
