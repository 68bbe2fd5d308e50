"""grouped_gemm in Triton: programs find their group on the device, so sizes of groups are never waited for.

Forward and grad_x are one kernel (the weight is addressed by strides): the grid has as many tiles of rows as there can
be, `rows / BLOCK_M + groups`; a program counts through `ends` which group its tile belongs to and leaves if none.
grad_weight: one program per group and tile of the weight, over the group's rows in order; it also sums the bias's.
fp32 is multiplied in full precision (`ieee`), not in TF32. (`WIDEN`: the interpreter
cannot multiply bf16.)
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._dispatch import interpreting
from ds_kernels._triton import Build, next_power_of_2, type_name
from ds_kernels.ops.grouped_gemm import reference

__all__ = ["builds", "grouped_gemm", "grouped_gemm_backward"]

NUM_WARPS = 8


@triton.jit
def _rows(
    x, weight, ends, bias, y, rows, groups, inner, out, stride_g, stride_o, stride_i,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    tile, column = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, GROUPS)
    high = tl.load(ends + index, index < groups, other=0).to(tl.int32)
    low = tl.load(ends + index - 1, (index > 0) & (index < groups), other=0).to(tl.int32)
    tiles = (high - low + M - 1) // M
    upto = tl.cumsum(tiles, 0)
    group = tl.sum((upto <= tile).to(tl.int32), 0)
    cols = column * N + tl.arange(0, N)
    if group >= groups:  # tiles of the rows of no group: zero, from the last end on
        line = tl.max(high, 0) + (tile - tl.max(upto, 0)) * M + tl.arange(0, M)
        keep = (line < rows)[:, None] & (cols < out)[None, :]
        tl.store(y + line.to(tl.int64)[:, None] * out + cols[None, :], tl.zeros((M, N), y.dtype.element_ty), keep)
    else:
        mine = index == group
        first = tl.sum(tl.where(mine, low, 0), 0) + (tile - tl.sum(tl.where(mine, upto - tiles, 0), 0)) * M
        line = first + tl.arange(0, M)
        in_group = line < tl.sum(tl.where(mine, high, 0), 0)
        step = tl.arange(0, K)
        left = x + line.to(tl.int64)[:, None] * inner + step[None, :]
        right = weight + group.to(tl.int64) * stride_g + step[:, None] * stride_i + cols[None, :] * stride_o
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, inner, K):
            a = tl.load(left, in_group[:, None] & (k + step < inner)[None, :], other=0.0)
            b = tl.load(right, (k + step < inner)[:, None] & (cols < out)[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
            left += K
            right += K * stride_i
        if HAS_BIAS:
            total += tl.load(bias + group * out + cols, cols < out, other=0.0).to(tl.float32)[None, :]
        keep = in_group[:, None] & (cols < out)[None, :]
        tl.store(y + line.to(tl.int64)[:, None] * out + cols[None, :], total.to(y.dtype.element_ty), keep)


@triton.jit
def _weights(
    grad, x, ends, grad_weight, grad_bias, inner, out,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, N: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * N + tl.arange(0, N)
    cols = tl.program_id(1) * J + tl.arange(0, J)
    low = tl.load(ends + group - 1, group > 0, other=0).to(tl.int64)
    high = tl.load(ends + group).to(tl.int64)
    step = tl.arange(0, K)
    total, column = tl.zeros((N, J), tl.float32), tl.zeros((N,), tl.float32)
    for k in range(low, high, K):
        line = k + step
        g = tl.load(
            grad + line[None, :] * out + rows[:, None], (line < high)[None, :] & (rows < out)[:, None], other=0.0
        )
        if HAS_WEIGHT:
            v = tl.load(
                x + line[:, None] * inner + cols[None, :], (line < high)[:, None] & (cols < inner)[None, :], other=0.0
            )
            if WIDEN:
                g, v = g.to(tl.float32), v.to(tl.float32)
            total = tl.dot(g, v, total, input_precision="ieee")
        if HAS_BIAS:
            column += tl.sum(g.to(tl.float32), 1)
    if HAS_WEIGHT:
        keep = (rows < out)[:, None] & (cols < inner)[None, :]
        at = grad_weight + group * out * inner + rows[:, None] * inner + cols[None, :]
        tl.store(at, total.to(grad_weight.dtype.element_ty), keep)
    if HAS_BIAS and tl.program_id(1) == 0:
        tl.store(grad_bias + group * out + rows, column.to(grad_bias.dtype.element_ty), rows < out)


def _tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, columns, depth) of a program's tile: full-precision fp32 is multiplied outside the tensor cores."""
    return (32, 64, 32) if dtype == torch.float32 else (64, 128, 32)


def _launch(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    (rows, inner), (groups, out, _) = x.shape, weight.shape
    m, n, k = _tiles(x.dtype)
    y = x.new_empty(rows, out)
    if not y.numel():
        return y
    grid = (triton.cdiv(rows, m) + groups, triton.cdiv(out, n))
    _rows[grid](
        x, weight, ends, bias, y, rows, groups, inner, out, *weight.stride(),
        bias is not None, max(2, next_power_of_2(groups)), m, n, k, interpreting(),
        num_warps=NUM_WARPS, num_stages=2,
    )  # fmt: skip
    return y


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64:
        return reference.grouped_gemm(x, weight, ends, bias)
    return _launch(x, weight, ends, None if bias is None else bias.contiguous())


def grouped_gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, has_bias: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64:
        return reference.grouped_gemm_backward(grad, x, weight, ends, has_bias, need_x, need_weight)
    groups, out, inner = weight.shape
    grad_x = _launch(grad, weight.transpose(1, 2), ends, None) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_empty(weight.shape[:2] if has_bias else (0,))
    if groups and out and (need_weight or has_bias):
        n, j, k = _tiles(x.dtype)
        columns = max(1, triton.cdiv(inner, j)) if need_weight else 1
        _weights[(triton.cdiv(out, n), columns, groups)](
            grad, x, ends, grad_weight, grad_bias, inner, out, has_bias, need_weight, n, j, k, interpreting(),
            num_warps=NUM_WARPS, num_stages=2,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def builds() -> Iterator[Build]:
    """Both kernels in every dtype's tiles."""
    for dtype, groups in ((torch.bfloat16, 8), (torch.float16, 128), (torch.float32, 64)):
        name = f"*{type_name(dtype)}"
        m, n, k = _tiles(dtype)
        tensors = {"x": name, "weight": name, "ends": "*i32", "bias": name, "y": name}
        numbers = dict.fromkeys(("rows", "groups", "inner", "out", "stride_g", "stride_o", "stride_i"), "i32")
        yield Build(
            _rows,
            {**tensors, **numbers},
            {"HAS_BIAS": True, "GROUPS": groups, "M": m, "N": n, "K": k, "WIDEN": False},
            NUM_WARPS,
        )
        tensors = {"grad": name, "x": name, "ends": "*i64", "grad_weight": name, "grad_bias": name}
        constants = {"HAS_BIAS": True, "HAS_WEIGHT": True, "N": m, "J": n, "K": k, "WIDEN": False}
        yield Build(_weights, {**tensors, "inner": "i32", "out": "i32"}, constants, NUM_WARPS)
