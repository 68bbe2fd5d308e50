"""bias_dropout_residual in Triton: tiles of rows and columns; backward sums the bias's gradient of groups of rows."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build
from ds_kernels.ops.bias_dropout_residual import reference

__all__ = ["bias_dropout_residual", "bias_dropout_residual_backward", "builds"]

ROWS, COLS = 8, 128
"""A tile."""
NUM_GROUPS = 128
"""Groups of rows at most in the backward pass."""


@triton.jit
def _mix(x):
    """The reference's, on unsigned 32-bit words."""
    x = (x ^ (x >> 16)) * tl.full((1, 1), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((1, 1), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _drop(values, seed, row, col, threshold, scale, COLS: tl.constexpr):
    """Zero what is not kept, scale the rest; see the reference for the words."""
    word = tl.load(seed + tl.zeros((1, 1), tl.int32))
    key0 = _mix(word.to(tl.uint32) ^ tl.full((1, 1), 0x9E3779B9, tl.uint32))
    key1 = _mix((word >> 32).to(tl.uint32) ^ key0)
    row0 = _mix(row.to(tl.uint32) ^ key0)
    row1 = _mix(row0 + key1)
    kept = _mix(_mix(col.to(tl.uint32) ^ row0) ^ row1).to(tl.int64) >= threshold
    return tl.where(kept, values * scale, 0.0)


@triton.jit
def _forward(
    x, bias, residual, seed, out, rows, dim, threshold, scale,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < dim)
    values = tl.load(x + row * dim + col, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + col, col < dim, other=0.0).to(tl.float32)
    if DROP:
        values = _drop(values, seed, row, col, threshold, scale, COLS)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * dim + col, mask, other=0.0).to(tl.float32)
    tl.store(out + row * dim + col, values.to(out.dtype.element_ty), mask)


@triton.jit
def _backward(
    grad, seed, grad_x, partial, rows, dim, per_group, threshold, scale,
    DROP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, per_group, ROWS):
        row = group * per_group + start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (row < (group + 1) * per_group) & (col < dim)
        values = tl.load(grad + row * dim + col, mask, other=0.0).to(tl.float32)
        if DROP:
            values = _drop(values, seed, row, col, threshold, scale, COLS)
        total += values
        tl.store(grad_x + row * dim + col, values.to(grad_x.dtype.element_ty), mask)
    tl.store(partial + group * dim + col, tl.sum(total, 0)[None, :], col < dim)


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.bias_dropout_residual(x, bias, residual, seed, p)
    out, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    _forward[(triton.cdiv(rows, ROWS), triton.cdiv(dim, COLS))](
        x, bias, residual, seed, out, rows, dim, reference.threshold_of(p), reference.scale_of(p), bias is not None,
        residual is not None, p > 0, ROWS, COLS,
    )  # fmt: skip
    return out


def bias_dropout_residual_backward(grad: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if grad.dtype == torch.float64 or grad.numel() == 0:
        return reference.bias_dropout_residual_backward(grad, seed, p)
    grad_x, dim = torch.empty_like(grad), grad.shape[-1]
    rows = grad.numel() // dim
    per_group = triton.cdiv(triton.cdiv(rows, NUM_GROUPS), ROWS) * ROWS
    groups = triton.cdiv(rows, per_group)
    partial = torch.empty(groups, dim, dtype=torch.float32, device=grad.device)
    _backward[(groups, triton.cdiv(dim, COLS))](
        grad, seed, grad_x, partial, rows, dim, per_group, reference.threshold_of(p), reference.scale_of(p), p > 0,
        ROWS, COLS,
    )  # fmt: skip
    return grad_x, partial.sum(0)


def builds() -> Iterator[Build]:
    """With everything, for both forms that a threshold takes as an argument."""
    for name, threshold in (("bf16", "i32"), ("fp32", "i64")):
        shared = {"seed": "*i64", "rows": "i32", "dim": "i32", "threshold": threshold, "scale": "fp32"}
        constants = {"DROP": True, "ROWS": ROWS, "COLS": COLS}
        tensors = dict.fromkeys(("x", "bias", "residual", "out"), f"*{name}")
        yield Build(_forward, {**tensors, **shared}, {**constants, "HAS_BIAS": True, "HAS_RESIDUAL": True})
        tensors = {"grad": f"*{name}", "grad_x": f"*{name}", "partial": "*fp32", "per_group": "i32"}
        yield Build(_backward, {**tensors, **shared}, constants)
