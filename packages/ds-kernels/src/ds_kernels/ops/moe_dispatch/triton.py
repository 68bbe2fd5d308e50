"""moe_dispatch and moe_combine in Triton: a program per row or token and block of columns; no atomics."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.moe_dispatch import reference

__all__ = ["builds", "rows_of_tokens", "tokens_of_rows", "weight_gradient"]

MAX_BLOCK = 1024
"""Columns of one program."""


@triton.jit
def _rows(x, sources, weights, out, hidden, top_k, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + row)
    inside = cols < hidden
    # the row of no choice reads nothing
    values = tl.load(x + source // top_k * hidden + cols, cols < tl.where(source >= 0, hidden, 0), other=0.0)
    if HAS_WEIGHTS:
        values = values.to(tl.float32) * tl.load(weights + tl.maximum(source, 0))
    tl.store(out + row * hidden + cols, values.to(out.dtype.element_ty), inside)


@triton.jit
def _tokens(y, slots, weights, out, hidden, top_k, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(top_k):
        slot = tl.load(slots + token * top_k + j)
        if slot >= 0:
            values = tl.load(y + slot * hidden + cols, inside, other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                values = values * tl.load(weights + token * top_k + j)
            total += values
    tl.store(out + token * hidden + cols, total.to(out.dtype.element_ty), inside)


@triton.jit
def _dots(grad, y, slots, out, hidden, top_k, BLOCK: tl.constexpr):
    choice = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + choice)
    total = tl.zeros((BLOCK,), tl.float32)
    if slot >= 0:
        for start in range(0, hidden, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < hidden
            g = tl.load(grad + choice // top_k * hidden + cols, inside, other=0.0).to(tl.float32)
            total += g * tl.load(y + slot * hidden + cols, inside, other=0.0).to(tl.float32)
    tl.store(out + choice, tl.sum(total, 0))


def _takes(*tensors: Tensor) -> bool:
    return tensors[0].dtype != torch.float64 and all(tensor.numel() for tensor in tensors)


def _block(hidden: int) -> int:
    return min(MAX_BLOCK, next_power_of_2(hidden))


def rows_of_tokens(x: Tensor, sources: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """As the reference, which takes fp64."""
    if not _takes(x, sources):
        return reference.rows_of_tokens(x, sources, weights, top_k)
    hidden = x.shape[1]
    block = _block(hidden)
    out = x.new_empty(sources.shape[0], hidden)
    grid = (sources.shape[0], triton.cdiv(hidden, block))
    factors = None if weights is None else weights.contiguous()
    _rows[grid](x, sources, factors, out, hidden, top_k, weights is not None, block)
    return out


def tokens_of_rows(y: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """As the reference, which takes fp64."""
    if not _takes(y, slots):
        return reference.tokens_of_rows(y, slots, weights)
    (tokens, top_k), hidden = slots.shape, y.shape[1]
    block = _block(hidden)
    out = y.new_empty(tokens, hidden)
    grid = (tokens, triton.cdiv(hidden, block))
    factors = None if weights is None else weights.contiguous()
    _tokens[grid](y, slots, factors, out, hidden, top_k, weights is not None, block)
    return out


def weight_gradient(grad: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    """As the reference, which takes fp64."""
    if not _takes(grad, y, slots):
        return reference.weight_gradient(grad, y, slots)
    out = torch.empty(slots.shape, dtype=torch.float32, device=grad.device)
    hidden = y.shape[1]
    _dots[(slots.numel(),)](grad, y, slots, out, hidden, slots.shape[1], _block(hidden))
    return out


def builds() -> Iterator[Build]:
    """The three kernels at their largest block."""
    common = {"hidden": "i32", "top_k": "i32"}
    rows = {"x": "*bf16", "sources": "*i64", "weights": "*fp32", "out": "*bf16", **common}
    yield Build(_rows, rows, {"HAS_WEIGHTS": True, "BLOCK": MAX_BLOCK}, num_stages=3)
    tokens = {"y": "*bf16", "slots": "*i64", "weights": "*fp32", "out": "*bf16", **common}
    yield Build(_tokens, tokens, {"HAS_WEIGHTS": True, "BLOCK": MAX_BLOCK}, num_stages=3)
    dots = {"grad": "*fp32", "y": "*fp32", "slots": "*i64", "out": "*fp32", **common}
    yield Build(_dots, dots, {"BLOCK": MAX_BLOCK}, num_stages=3)
