"""rope on CPU: one pass over queries and keys in numba, whatever their layout; torch's operations without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.rope import reference

__all__ = ["rope"]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """As the reference."""
    code = CODES.get(q.dtype)
    if not HAS_NUMBA or code is None:
        return reference.rope(q, k, cos, sin, interleaved)
    return _rotate(q, cos, sin, interleaved, code), _rotate(k, cos, sin, interleaved, code)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, code: int) -> Tensor:
    from ds_kernels.ops.rope.cpu_numba import POSITIONS, rotate

    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, heads, seq, dim = x.shape
    blocks = -(-seq // POSITIONS)
    angles = 0 if cos.shape[0] == 1 else seq
    launch(
        rotate, x, out, cos, sin, heads, seq, dim, cos.shape[-1], angles, code, int(interleaved),
        *x.stride()[:3], *out.stride()[:3], items=batch * blocks, grain=max(1, (1 << 14) // (POSITIONS * heads * dim)),
    )  # fmt: skip
    return out
