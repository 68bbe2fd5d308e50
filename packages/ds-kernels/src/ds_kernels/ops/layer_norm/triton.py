"""layer_norm in Triton: a program per row forward, a program per fixed group of rows backward, with partial sums.

A row is walked in blocks (mean, variance, then results; all but the first reading come from cache), so that rows of
any length need few registers. The gradients of weight and bias of a group stay in registers where a row is one block,
otherwise they are summed in the program's own rows of `partial`, which stay in the L2 cache.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.layer_norm import reference

__all__ = ["builds", "layer_norm", "layer_norm_backward"]

MAX_BLOCK = 1 << 12
"""Elements of a row that a program holds at a time."""
NUM_GROUPS = 256
"""Programs of the backward pass; each sums the weight and bias gradients of its rows."""


@triton.jit
def _row(x, residual, at, mask, HAS_RESIDUAL: tl.constexpr):
    """What is normalised: x, or the rounded sum."""
    values = tl.load(x + at, mask, other=0.0)
    if HAS_RESIDUAL:
        total = values.to(tl.float32) + tl.load(residual + at, mask, other=0.0).to(tl.float32)
        values = total.to(x.dtype.element_ty)
    return values


@triton.jit
def _forward(
    x, residual, weight, bias, y, total, mean, rstd, dim, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        plain += _row(x, residual, row * dim + cols, cols < dim, HAS_RESIDUAL).to(tl.float32)
    centre = tl.sum(plain, 0) / dim
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        values = _row(x, residual, row * dim + cols, cols < dim, HAS_RESIDUAL).to(tl.float32)
        centred = tl.where(cols < dim, values - centre, 0.0)
        square += centred * centred
    inverse = 1.0 / tl.sqrt(tl.sum(square, 0) / dim + eps)
    tl.store(mean + row, centre)
    tl.store(rstd + row, inverse)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < dim
        values = _row(x, residual, row * dim + cols, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(total + row * dim + cols, values, mask)
        normal = (values.to(tl.float32) - centre) * inverse
        if HAS_WEIGHT:
            normal *= tl.load(weight + cols, mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            normal += tl.load(bias + cols, mask, other=0.0).to(tl.float32)
        tl.store(y + row * dim + cols, normal.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    grad, grad_total, x, weight, mean, rstd, grad_x, partial, rows, dim,
    HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    of_weight, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(rows * group // groups, rows * (group + 1) // groups):
        centre, inverse = tl.load(mean + row), tl.load(rstd + row)
        plain, dot = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < dim
            scaled = tl.load(grad + row * dim + cols, mask, other=0.0).to(tl.float32)
            normal = (tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32) - centre) * inverse
            if HAS_WEIGHT:
                scaled *= tl.load(weight + cols, mask, other=0.0).to(tl.float32)
            plain += scaled
            dot += scaled * normal
        average, pull = tl.sum(plain, 0) / dim, tl.sum(dot, 0) / dim
        for start in range(0, dim, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < dim
            scaled = tl.load(grad + row * dim + cols, mask, other=0.0).to(tl.float32)
            normal = (tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32) - centre) * inverse
            if HOLD:
                of_weight += scaled * normal
                of_bias += scaled
            else:
                own, other = partial + group * dim + cols, partial + (groups + group) * dim + cols
                tl.store(own, tl.load(own, mask, other=0.0) + scaled * normal, mask)
                tl.store(other, tl.load(other, mask, other=0.0) + scaled, mask)
            if HAS_WEIGHT:
                scaled *= tl.load(weight + cols, mask, other=0.0).to(tl.float32)
            result = inverse * (scaled - average - normal * pull)
            if HAS_TOTAL:
                result += tl.load(grad_total + row * dim + cols, mask, other=0.0).to(tl.float32)
            tl.store(grad_x + row * dim + cols, result.to(grad_x.dtype.element_ty), mask)
        if not HOLD:
            tl.debug_barrier()
    if HOLD:
        cols = tl.arange(0, BLOCK)
        tl.store(partial + group * dim + cols, of_weight, cols < dim)
        tl.store(partial + (groups + group) * dim + cols, of_bias, cols < dim)


def _tile(dim: int) -> tuple[int, int]:
    """Block and warps for rows of a length."""
    block = min(next_power_of_2(dim), MAX_BLOCK)
    return block, min(16, max(1, block // 256))


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.layer_norm(x, residual, weight, bias, eps)
    dim = x.shape[-1]
    block, warps = _tile(dim)
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    _forward[(x.numel() // dim,)](
        x, residual, weight, bias, y, total, mean, rstd, dim, eps, residual is not None, weight is not None,
        bias is not None, block, num_warps=warps,
    )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.layer_norm_backward(grad, grad_total, x, weight, mean, rstd)
    dim = x.shape[-1]
    rows, (block, warps) = x.numel() // dim, _tile(dim)
    groups = min(rows, NUM_GROUPS)
    grad_x = torch.empty_like(x)
    partial = torch.zeros(2, groups, dim, dtype=torch.float32, device=x.device)
    _backward[(groups,)](
        grad, grad_total, x, weight, mean, rstd, grad_x, partial, rows, dim, grad_total is not None,
        weight is not None, dim <= block, block, num_warps=warps,
    )  # fmt: skip
    return grad_x, partial[0].sum(0), partial[1].sum(0)


def builds() -> Iterator[Build]:
    """A usual width in each dtype, with and without a residual; the widest block held, and rows longer than that."""
    for name, dim in (("bf16", 1000), ("fp16", MAX_BLOCK), ("fp32", 2 * MAX_BLOCK)):
        block, warps = _tile(dim)
        fused = name != "fp16"
        rows = {"x": f"*{name}", "weight": f"*{name}", "mean": "*fp32", "rstd": "*fp32", "dim": "i32"}
        tensors = dict.fromkeys(("residual", "bias", "y", "total"), f"*{name}") | {"eps": "fp32"}
        constants = {"HAS_RESIDUAL": fused, "HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK": block}
        yield Build(_forward, rows | tensors, constants, warps)
        tensors = {"grad": f"*{name}", "grad_total": f"*{name}", "grad_x": f"*{name}", "partial": "*fp32"}
        constants = {"HAS_TOTAL": fused, "HAS_WEIGHT": True, "HOLD": dim <= block, "BLOCK": block}
        yield Build(_backward, {**rows, **tensors, "rows": "i32"}, constants, warps)
