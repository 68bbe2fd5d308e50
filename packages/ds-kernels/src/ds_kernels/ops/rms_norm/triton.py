"""rms_norm in Triton: one program per row forward; backward over fixed groups of rows with partial weight gradients."""
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

MAX_DIM = 1 << 13
"""The longest row that one program holds in registers."""
NUM_GROUPS = 256
"""Programs of the backward pass; each sums the weight gradient of its rows."""


@triton.jit
def _forward(x, weight, y, rstd, dim, eps, offset, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    values = tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / dim + eps)
    tl.store(rstd + row, inverse)
    values = values * inverse
    if HAS_WEIGHT:
        values = values * (offset + tl.load(weight + cols, mask, other=0.0).to(tl.float32))
    tl.store(y + row * dim + cols, values.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(grad, x, weight, rstd, grad_x, partial, rows, dim, offset, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = offset + tl.load(weight + cols, mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows * group // groups, rows * (group + 1) // groups):
        g = tl.load(grad + row * dim + cols, mask, other=0.0).to(tl.float32)
        v = tl.load(x + row * dim + cols, mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        total += g * v * inverse
        scaled = g * scale
        pull = tl.sum(scaled * v, 0) / dim * inverse * inverse
        tl.store(grad_x + row * dim + cols, (inverse * (scaled - v * pull)).to(grad_x.dtype.element_ty), mask)
    if HAS_WEIGHT:
        tl.store(partial + group * dim + cols, total, mask)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 256))


def _takes(x: Tensor) -> bool:
    return x.dtype != torch.float64 and 0 < x.shape[-1] <= MAX_DIM and x.numel() > 0


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64 and rows that are too long."""
    if not _takes(x):
        return reference.rms_norm(x, weight, eps, offset)
    dim = x.shape[-1]
    block = next_power_of_2(dim)
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _forward[(x.numel() // dim,)](
        x, weight, y, rstd, dim, eps, offset, weight is not None, block, num_warps=_num_warps(block)
    )
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64 and rows that are too long."""
    if not _takes(x):
        return reference.rms_norm_backward(grad, x, weight, rstd, offset)
    dim = x.shape[-1]
    rows, block = x.numel() // dim, next_power_of_2(dim)
    groups = min(rows, NUM_GROUPS)
    grad_x = torch.empty_like(x)
    partial = torch.empty(groups, dim, dtype=torch.float32, device=x.device) if weight is not None else None
    _backward[(groups,)](
        grad, x, weight, rstd, grad_x, partial, rows, dim, offset, weight is not None, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return grad_x, x.new_empty(0) if partial is None or weight is None else partial.sum(0).to(weight.dtype)


def builds() -> Iterator[Build]:
    """Every specialisation that is launched, at a usual, an odd and the largest width."""
    for name, block in (("bf16", 1024), ("fp16", 4096), ("fp32", MAX_DIM)):
        rows = {"x": f"*{name}", "weight": f"*{name}", "rstd": "*fp32", "dim": "i32", "offset": "fp32"}
        constants = {"HAS_WEIGHT": True, "BLOCK": block}
        yield Build(_forward, {**rows, "y": f"*{name}", "eps": "fp32"}, constants, _num_warps(block))
        tensors = {"grad": f"*{name}", "grad_x": f"*{name}", "partial": "*fp32", "rows": "i32"}
        yield Build(_backward, {**rows, **tensors}, constants, _num_warps(block))
