"""swiglu and geglu on CPU: one pass over memory in numba; torch's operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.glu import reference

__all__ = ["glu", "glu_backward"]

GRAIN = 8
"""Blocks handed out at a time: 8K elements, some microseconds of work."""


def glu(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """As the reference."""
    code = CODES.get(gate.dtype)
    if not HAS_NUMBA or code is None or gate.numel() == 0:
        return reference.glu(gate, up, kind)
    from ds_kernels.ops.glu.cpu_numba import BLOCK, forward

    out, numel = torch.empty_like(gate), gate.numel()
    launch(forward, gate, up, out, numel, code, kind, items=-(-numel // BLOCK), grain=GRAIN)
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(gate.dtype)
    if not HAS_NUMBA or code is None or gate.numel() == 0:
        return reference.glu_backward(grad, gate, up, kind)
    from ds_kernels.ops.glu.cpu_numba import BLOCK, backward

    grad_gate, grad_up, numel = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    launch(
        backward, grad, gate, up, grad_gate, grad_up, numel, code, kind, items=-(-numel // BLOCK), grain=GRAIN
    )  # fmt: skip
    return grad_gate, grad_up
