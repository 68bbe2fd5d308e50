"""bias_gelu in Triton: tiles of rows and columns; backward sums the bias's gradient of fixed groups of rows."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build
from ds_kernels.ops.bias_gelu import reference
from ds_kernels.ops.glu.triton import activation

__all__ = ["bias_gelu", "bias_gelu_backward", "builds"]

ROWS, COLS = 8, 128
"""A tile."""
NUM_GROUPS = 128
"""Groups of rows at most in the backward pass."""


@triton.jit
def _forward(x, bias, y, rows, dim, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < dim)
    values = tl.load(x + row * dim + col, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + col, col < dim, other=0.0).to(tl.float32)
    value, _ = activation(values, KIND)
    tl.store(y + row * dim + col, value.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    grad, x, bias, grad_x, partial, rows, dim, per_group,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    shift = tl.zeros((1, COLS), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + col, col < dim, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, per_group, ROWS):
        row = group * per_group + start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (row < (group + 1) * per_group) & (col < dim)
        values = tl.load(x + row * dim + col, mask, other=0.0).to(tl.float32) + shift
        _, slope = activation(values, KIND)
        result = slope * tl.load(grad + row * dim + col, mask, other=0.0).to(tl.float32)
        total += result
        tl.store(grad_x + row * dim + col, result.to(grad_x.dtype.element_ty), mask)
    tl.store(partial + group * dim + col, tl.sum(total, 0)[None, :], col < dim)


def bias_gelu(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.bias_gelu(x, bias, kind)
    y, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(dim, COLS))
    _forward[grid](x, bias, y, rows, dim, bias is not None, kind, ROWS, COLS)
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.bias_gelu_backward(grad, x, bias, kind)
    grad_x, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    per_group = triton.cdiv(triton.cdiv(rows, NUM_GROUPS), ROWS) * ROWS
    groups = triton.cdiv(rows, per_group)
    partial = torch.empty(groups, dim, dtype=torch.float32, device=x.device)
    _backward[(groups, triton.cdiv(dim, COLS))](
        grad, x, bias, grad_x, partial, rows, dim, per_group, bias is not None, kind, ROWS, COLS
    )
    return grad_x, partial.sum(0)


def builds() -> Iterator[Build]:
    """Both forms, with the bias."""
    for name, kind in (("bf16", 2), ("fp32", 1)):
        constants = {"HAS_BIAS": True, "KIND": kind, "ROWS": ROWS, "COLS": COLS}
        inputs = {"x": f"*{name}", "bias": f"*{name}", "rows": "i32", "dim": "i32"}
        yield Build(_forward, {**inputs, "y": f"*{name}"}, constants)
        more = {"grad": f"*{name}", "grad_x": f"*{name}", "partial": "*fp32", "per_group": "i32"}
        yield Build(_backward, {**inputs, **more}, constants)
