"""The specification of grouped_gemm: plain torch, one product per group, in the precision of its inputs (>= fp32)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["grouped_gemm", "grouped_gemm_backward", "ranges"]


def ranges(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(group, first row, last row + 1)` of every group that has rows."""
    low = 0
    for group, high in enumerate(ends.tolist()):
        if high > low:
            yield group, low, high
        low = max(low, high)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """`y[r] = x[r] @ weight[g].T + bias[g]` for the rows r of group g; zero for rows of no group."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for group, low, high in ranges(ends):
        product = _wide(x[low:high]) @ _wide(weight[group]).t()
        y[low:high] = (product if bias is None else product + _wide(bias[group])).to(x.dtype)
    return y


def grouped_gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, has_bias: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(grad_x, grad_weight, grad_bias)`; those not needed are empty. Groups without rows have gradient zero."""
    grad_x = x.new_zeros(x.shape if need_x else (0,))
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))
    grad_bias = weight.new_zeros(weight.shape[:2] if has_bias else (0,))
    for group, low, high in ranges(ends):
        rows = _wide(grad[low:high])
        if need_x:
            grad_x[low:high] = (rows @ _wide(weight[group])).to(x.dtype)
        if need_weight:
            grad_weight[group] = (rows.t() @ _wide(x[low:high])).to(weight.dtype)
        if has_bias:
            grad_bias[group] = rows.sum(0).to(weight.dtype)
    return grad_x, grad_weight, grad_bias
