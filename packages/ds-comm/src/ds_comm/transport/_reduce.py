"""Elementwise reductions over ranks, in rank order: what every transport that sums by itself uses.

SUM and AVG of 16-bit and fp32 rows accumulate in fp32 and round once; AVG divides by the group size at the end. Other
types accumulate in themselves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.errors import CommArgumentError
from ds_comm.kernels import sum_rows

Op = dist.ReduceOp

_PAIRWISE = {
    Op.PRODUCT: torch.mul,
    Op.MIN: torch.minimum,
    Op.MAX: torch.maximum,
    Op.BAND: torch.bitwise_and,
    Op.BOR: torch.bitwise_or,
    Op.BXOR: torch.bitwise_xor,
}
_SUMMED = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def can_reduce(dtype: torch.dtype) -> bool:
    """Whether ``reduce_rows`` takes this dtype."""
    return dtype in _SUMMED


def red_op(op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> dist.ReduceOp.RedOpType:
    """The plain kind behind ``ReduceOp.SUM`` or ``ReduceOp("sum")``."""
    return op if isinstance(op, dist.ReduceOp.RedOpType) else op.op  # type: ignore[attr-defined]  # missing in torch's stubs


def reduce_rows(rows: Tensor, out: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """out ``[n]`` = ``op`` over the rows of ``[size, n]``, in order; out must not overlap them."""
    if op == Op.SUM:
        sum_rows(rows, out)
    elif op == Op.AVG:
        if not rows.dtype.is_floating_point:
            raise CommArgumentError(f"ReduceOp.AVG needs a floating dtype, got {rows.dtype}; use SUM and divide")
        size = rows.shape[0]
        if rows.dtype in (torch.float32, torch.float64):
            sum_rows(rows, out)
            out.div_(size)
        else:
            wide = torch.empty(out.shape, dtype=torch.float32)
            sum_rows(rows, wide)
            out.copy_(wide.div_(size))
    elif op in _PAIRWISE:
        wide = rows[0].to(torch.float32) if rows.dtype in (torch.bfloat16, torch.float16) else rows[0].clone()
        for row in range(1, rows.shape[0]):
            wide = _PAIRWISE[op](wide, rows[row])
        out.copy_(wide)
    else:
        raise CommArgumentError(f"{op} on CPU tensors: use SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR or BXOR")
