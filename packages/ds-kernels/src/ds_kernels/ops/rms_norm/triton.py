"""rms_norm in Triton: a program per row forward, a program per fixed group of rows backward, with a partial sum each.

A row is walked in blocks, twice (statistics, then results; the second reading comes from cache), so that rows of any
length need few registers. The weight's gradient of a group stays in registers where a row is one block, otherwise it
is summed in the program's own row of `partial`, which stays in the L2 cache.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.rms_norm import reference

__all__ = ["builds", "rms_norm", "rms_norm_backward"]

MAX_BLOCK = 1 << 12
"""Elements of a row that a program holds at a time."""
NUM_GROUPS = 256
"""Programs of the backward pass; each sums the weight gradient of its rows."""


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
    x, residual, weight, y, total, rstd, dim, eps, offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        values = _row(x, residual, row * dim + cols, cols < dim, HAS_RESIDUAL).to(tl.float32)
        square += values * values
    inverse = 1.0 / tl.sqrt(tl.sum(square, 0) / dim + eps)
    tl.store(rstd + row, inverse)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < dim
        values = _row(x, residual, row * dim + cols, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(total + row * dim + cols, values, mask)
        normal = values.to(tl.float32) * inverse
        if HAS_WEIGHT:
            normal = normal * (offset + tl.load(weight + cols, mask, other=0.0).to(tl.float32))
        tl.store(y + row * dim + cols, normal.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    grad, grad_total, x, weight, rstd, grad_x, partial, rows, dim, offset,
    HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    held = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows * group // groups, rows * (group + 1) // groups):
        inverse = tl.load(rstd + row)
        dot = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < dim
            product = tl.load(grad + row * dim + cols, mask, other=0.0).to(tl.float32)
            product *= tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                product *= offset + tl.load(weight + cols, mask, other=0.0).to(tl.float32)
            dot += product
        pull = tl.sum(dot, 0) / dim * inverse * inverse
        for start in range(0, dim, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < dim
            scaled = tl.load(grad + row * dim + cols, mask, other=0.0).to(tl.float32)
            values = tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                share = scaled * values * inverse
                if HOLD:
                    held += share
                else:
                    own = partial + group * dim + cols
                    tl.store(own, tl.load(own, mask, other=0.0) + share, mask)
                scaled *= offset + tl.load(weight + cols, mask, other=0.0).to(tl.float32)
            result = inverse * (scaled - values * pull)
            if HAS_TOTAL:
                result += tl.load(grad_total + row * dim + cols, mask, other=0.0).to(tl.float32)
            tl.store(grad_x + row * dim + cols, result.to(grad_x.dtype.element_ty), mask)
        if HAS_WEIGHT and not HOLD:
            tl.debug_barrier()
    if HAS_WEIGHT and HOLD:
        cols = tl.arange(0, BLOCK)
        tl.store(partial + group * dim + cols, held, cols < dim)


def _tile(dim: int) -> tuple[int, int]:
    """Block and warps for rows of a length."""
    block = min(next_power_of_2(dim), MAX_BLOCK)
    return block, min(16, max(1, block // 256))


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.rms_norm(x, residual, weight, eps, offset)
    dim = x.shape[-1]
    block, warps = _tile(dim)
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    _forward[(x.numel() // dim,)](
        x, residual, weight, y, total, rstd, dim, eps, offset, residual is not None, weight is not None, block,
        num_warps=warps,
    )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.rms_norm_backward(grad, grad_total, x, weight, rstd, offset)
    dim = x.shape[-1]
    rows, (block, warps) = x.numel() // dim, _tile(dim)
    groups = min(rows, NUM_GROUPS)
    grad_x, partial = torch.empty_like(x), None
    if weight is not None:
        partial = torch.zeros(groups, dim, dtype=torch.float32, device=x.device)
    _backward[(groups,)](
        grad, grad_total, x, weight, rstd, grad_x, partial, rows, dim, offset, grad_total is not None,
        weight is not None, dim <= block, block, num_warps=warps,
    )  # fmt: skip
    return grad_x, x.new_empty(0) if partial is None or weight is None else partial.sum(0).to(weight.dtype)


def builds() -> Iterator[Build]:
    """A usual width in each dtype, with and without a residual; the widest block held, and rows longer than that."""
    for name, dim in (("bf16", 1000), ("fp16", MAX_BLOCK), ("fp32", 2 * MAX_BLOCK)):
        block, warps = _tile(dim)
        fused = name != "fp16"
        rows = {"x": f"*{name}", "weight": f"*{name}", "rstd": "*fp32", "dim": "i32", "offset": "fp32"}
        tensors = {"residual": f"*{name}", "y": f"*{name}", "total": f"*{name}", "eps": "fp32"}
        yield Build(
            _forward, rows | tensors, {"HAS_RESIDUAL": fused, "HAS_WEIGHT": True, "BLOCK": block}, warps
        )  # fmt: skip
        tensors = {"grad": f"*{name}", "grad_total": f"*{name}", "grad_x": f"*{name}", "partial": "*fp32"}
        constants = {"HAS_TOTAL": fused, "HAS_WEIGHT": True, "HOLD": dim <= block, "BLOCK": block}
        yield Build(_backward, {**rows, **tensors, "rows": "i32"}, constants, warps)
