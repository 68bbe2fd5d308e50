"""softmax in Triton: one program per row, walked in blocks twice: online maximum and sum, then results."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2, type_name
from ds_kernels.ops.softmax import reference
from ds_kernels.ops.softmax.mask import as_rows

__all__ = ["builds", "softmax", "softmax_backward"]

MAX_BLOCK = 1 << 12
"""Elements of a row that a program holds at a time."""
NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2


@triton.jit
def _scores(x, mask, cols, seen, scale, KIND: tl.constexpr):
    """scale * x + mask of one block; -inf where the row does not look."""
    inside = cols < seen
    values = tl.load(x + cols, inside, other=-float("inf")).to(tl.float32) * scale
    if KIND == 1:
        inside = inside & (tl.load(mask + cols, inside, other=0) != 0)
    if KIND == 2:
        values += tl.load(mask + cols, inside, other=0.0).to(tl.float32)
    return tl.where(inside, values, -float("inf"))


@triton.jit
def _seen(row, rows, cols, CAUSAL: tl.constexpr):
    """How many columns a row sees."""
    if CAUSAL:
        seen = tl.maximum(0, tl.minimum(cols, row % rows + 1 + cols - rows))
    else:
        seen = cols
    return seen


@triton.jit
def _forward(
    x, mask, y, rows, inner, cols, outer_stride, inner_stride, row_stride, scale,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    seen = _seen(row, rows, cols, CAUSAL)
    x += row * cols
    if KIND != 0:
        mask += row // (rows * inner) * outer_stride + row // rows % inner * inner_stride + row % rows * row_stride
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, seen, BLOCK):
        scores = _scores(x, mask, start + tl.arange(0, BLOCK), seen, scale, KIND)
        above = tl.maximum(highest, scores)
        origin = tl.where(above == -float("inf"), 0.0, above)
        whole = whole * tl.exp(highest - origin) + tl.exp(scores - origin)
        highest = above
    top = tl.max(highest, 0)
    origin = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(whole * tl.exp(highest - origin), 0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        result = tl.exp(_scores(x, mask, at, seen, scale, KIND) - origin) * inverse
        tl.store(y + row * cols + at, result.to(y.dtype.element_ty), at < cols)


@triton.jit
def _backward(grad, y, grad_x, rows, cols, scale, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    seen = _seen(row, rows, cols, CAUSAL)
    grad += row * cols
    y += row * cols
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, seen, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < seen
        products += tl.load(grad + at, mask, other=0.0).to(tl.float32) * tl.load(y + at, mask, other=0.0).to(tl.float32)
    dot = tl.sum(products, 0)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < seen
        share = tl.load(y + at, mask, other=0.0).to(tl.float32)
        result = scale * share * (tl.load(grad + at, mask, other=0.0).to(tl.float32) - dot)
        tl.store(grad_x + row * cols + at, tl.where(mask, result, 0.0).to(grad_x.dtype.element_ty), at < cols)


def _tile(cols: int) -> tuple[int, int]:
    """Block and warps for rows of a length."""
    block = min(next_power_of_2(cols), MAX_BLOCK)
    return block, min(16, max(1, block // 256))


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.softmax(x, mask, scale, causal)
    y, cols = torch.empty_like(x), x.shape[-1]
    rows, inner = x.shape[-2] if x.dim() > 1 else 1, x.shape[-3] if x.dim() > 2 else 1
    kind, strides = NO_MASK, (0, 0, 0)
    if mask is not None:
        kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
        mask = mask.float() if mask.dtype == torch.float64 else mask
        mask = as_rows(mask.contiguous().view(torch.uint8) if kind == BOOLEAN else mask, x)
        strides = (mask.stride(0), mask.stride(1), mask.stride(2))
    block, warps = _tile(cols)
    _forward[(x.numel() // cols,)](
        x, mask, y, rows, inner, cols, *strides, scale, kind, causal, block, num_warps=warps
    )  # fmt: skip
    return y


def softmax_backward(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    """As the reference, which takes fp64."""
    if y.dtype == torch.float64 or y.numel() == 0:
        return reference.softmax_backward(grad, y, scale, causal)
    grad_x, cols = torch.empty_like(y), y.shape[-1]
    rows, (block, warps) = y.shape[-2] if y.dim() > 1 else 1, _tile(cols)
    _backward[(y.numel() // cols,)](grad, y, grad_x, rows, cols, scale, causal, block, num_warps=warps)
    return grad_x


def builds() -> Iterator[Build]:
    """Each kind of mask, causal and not, a usual width and rows longer than a block."""
    sizes = dict.fromkeys(("rows", "inner", "cols", "outer_stride", "inner_stride", "row_stride"), "i32")
    for dtype, kind, causal, cols in (
        (torch.bfloat16, NO_MASK, True, 1000),
        (torch.float16, BOOLEAN, False, 128),
        (torch.float32, ADDITIVE, False, 2 * MAX_BLOCK),
    ):
        (block, warps), name = _tile(cols), type_name(dtype)
        tensors = {"x": f"*{name}", "y": f"*{name}", "mask": "*u8" if kind == BOOLEAN else f"*{name}", "scale": "fp32"}
        yield Build(_forward, {**tensors, **sizes}, {"KIND": kind, "CAUSAL": causal, "BLOCK": block}, warps)
        if kind != BOOLEAN:
            tensors = dict.fromkeys(("grad", "y", "grad_x"), f"*{name}")
            more = {"rows": "i32", "cols": "i32", "scale": "fp32"}
            yield Build(_backward, {**tensors, **more}, {"CAUSAL": causal, "BLOCK": block}, warps)
