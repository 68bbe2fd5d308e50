"""linear with quantised weights in Triton: W8A16, W4A16, W8A8 and W4A8, tensor-core products per group of columns.

A program takes BLOCK_ROWS activation rows and four panels. The codes of some columns are one stretch of memory per
panel; they are turned into a tile in registers, made whole numbers around zero (exact in every activation dtype),
multiplied, and the product scaled by the group's scales: codes never reach memory in another form. Of 4-bit codes the
low and the high halves are two products with the columns they belong to. With 8-bit activations the products are of
int8 in int32, where the tile is deep enough for that instruction.
"""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._dispatch import interpreting
from ds_kernels._triton import Build, type_name
from ds_kernels.ops.linear import reference
from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["builds", "linear"]

PANELS = 4
"""Panels of one program: 64 outputs."""


@triton.jit
def _product(x, row_mask, rows, columns, at, w, INT_DOT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """x[:, at] times the tile w [outputs, at], and the sums of x's rows."""
    mask = row_mask[:, None] & (at[None, :] < columns)
    tile = tl.load(x + rows[:, None] * columns + at[None, :], mask, other=0)
    total = tl.sum(tile.to(tl.float32), 1)
    if INT_DOT:
        dot = tl.dot(tile, tl.trans(w).to(tl.int8)).to(tl.float32)
    elif tile.dtype == tl.int8:
        dot = tl.dot(tile.to(tl.float16), tl.trans(w).to(tl.float16))
    else:
        dot = tl.dot(tile, tl.trans(w).to(tl.float32).to(tile.dtype), input_precision="ieee")
    return dot, total


@triton.jit
def _linear(
    x, codes, scale, centre, unit, bias, y, num_rows, outputs, columns, depth, panels, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, CENTRED: tl.constexpr, HAS_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    INT_DOT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NUM_PANELS: tl.constexpr,
):  # fmt: skip
    BLOCK_OUTPUTS: tl.constexpr = NUM_PANELS * 16
    HALVES: tl.constexpr = 8 // BITS
    QUADS: tl.constexpr = BLOCK_COLUMNS // 4 // HALVES
    TILE: tl.constexpr = BLOCK_COLUMNS // HALVES
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    first_panel = tl.program_id(0).to(tl.int64) * NUM_PANELS
    out = first_panel * 16 + tl.arange(0, BLOCK_OUTPUTS)
    panel = first_panel + tl.arange(0, NUM_PANELS)
    quad = tl.arange(0, QUADS)
    byte = tl.arange(0, 64)
    within = tl.arange(0, TILE)
    column = within // 4 * (4 * HALVES) + within % 4
    panel_quads = depth // 4 // HALVES
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    for first in range(0, depth, BLOCK_COLUMNS):
        line = first // (4 * HALVES) + quad
        place = (panel[:, None, None] * panel_quads + line[None, :, None]) * 64 + byte[None, None, :]
        mask = (panel < panels)[:, None, None] & (line < panel_quads)[None, :, None]
        stored = tl.load(codes + place, mask, other=0)
        stored = tl.permute(tl.reshape(stored, (NUM_PANELS, QUADS, 16, 4)), (0, 2, 1, 3))
        stored = tl.reshape(stored, (BLOCK_OUTPUTS, TILE)).to(tl.int16)
        if BITS == 8:
            dot, total = _product(
                x, row_mask, rows, columns, first + column, stored - MIDDLE, INT_DOT, BLOCK_ROWS
            )  # fmt: skip
        else:
            dot, total = _product(
                x, row_mask, rows, columns, first + column, (stored & 15) - MIDDLE, INT_DOT, BLOCK_ROWS
            )  # fmt: skip
            dot2, total2 = _product(
                x, row_mask, rows, columns, first + column + 4, (stored >> 4) - MIDDLE, INT_DOT, BLOCK_ROWS
            )  # fmt: skip
            dot, total = dot + dot2, total + total2
        group = first // GROUP
        fact = (out // 16 * groups + group) * 16 + out % 16
        by = tl.load(scale + fact, out // 16 < panels, other=0.0).to(tl.float32)
        part = dot * by[None, :]
        if CENTRED:
            shift = tl.load(centre + fact, out // 16 < panels, other=0.0).to(tl.float32)
            part += total[:, None] * shift[None, :]
        if HAS_UNIT:
            part = part * tl.load(unit + rows * groups + group, row_mask, other=0.0)[:, None]
        acc += part
    if HAS_BIAS:
        acc += tl.load(bias + out, out < outputs, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & (out < outputs)[None, :]
    tl.store(y + rows[:, None] * outputs + out[None, :], acc.to(y.dtype.element_ty), mask)


def _block_columns(group_size: int, whole: bool) -> int:
    """Columns of a tile; fp32 products do not run on tensor cores and would spill registers with larger ones."""
    return 64 if group_size % 64 == 0 and not whole else 32


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64 or not x.numel():
        return reference.linear(x, weight, bias, activation_bits)
    unit = None
    inputs = x
    if activation_bits == 8:
        codes, unit = reference.quantize_activations(x, weight.group_size)
        inputs, unit = codes.to(torch.int8), unit.contiguous()
    elif interpreting() and x.dtype == torch.bfloat16:
        inputs = x.float()  # the interpreter multiplies the bits of bf16, not their values
    num_rows = x.numel() // weight.columns
    panels, groups = weight.codes.shape[0], weight.scale.shape[1]
    y = torch.empty((*x.shape[:-1], weight.outputs), dtype=x.dtype, device=x.device)
    whole = x.dtype == torch.float32 and unit is None
    block_rows, block_columns = 16 if num_rows <= 16 or whole else 64, _block_columns(weight.group_size, whole)
    int_dot = unit is not None and block_columns * weight.bits // 8 >= 32
    grid = (triton.cdiv(panels, PANELS), triton.cdiv(num_rows, block_rows))
    _linear[grid](
        inputs, weight.codes, weight.scale, weight.centre, unit, bias, y, num_rows, weight.outputs, weight.columns,
        weight.depth, panels, groups, weight.bits, weight.group_size, weight.centre is not None, unit is not None,
        bias is not None, int_dot, block_rows, block_columns, PANELS,
    )  # fmt: skip
    return y


def builds() -> Iterator[Build]:
    """Of every kind one: bits, activations, centres, both block sizes."""
    sizes = dict.fromkeys(("num_rows", "outputs", "columns", "depth", "panels", "groups"), "i32")
    for bits, dtype, a8, centred, block_rows, group in (
        (8, torch.bfloat16, False, False, 16, 64),
        (4, torch.bfloat16, False, True, 64, 32),
        (8, torch.float32, False, True, 16, 64),
        (8, torch.bfloat16, True, False, 64, 64),
        (4, torch.float16, True, True, 16, 64),
    ):
        name = type_name(dtype)
        tensors = {
            "x": "*i8" if a8 else f"*{name}", "codes": "*u8", "scale": "*bf16", "centre": "*bf16", "unit": "*fp32",
            "bias": f"*{name}", "y": f"*{name}",
        }  # fmt: skip
        block_columns = _block_columns(group, dtype == torch.float32 and not a8)
        constants = {
            "BITS": bits, "GROUP": group, "CENTRED": centred, "HAS_UNIT": a8, "HAS_BIAS": True,
            "INT_DOT": a8 and block_columns * bits // 8 >= 32, "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns, "NUM_PANELS": PANELS,
        }  # fmt: skip
        yield Build(_linear, {**tensors, **sizes}, constants)
