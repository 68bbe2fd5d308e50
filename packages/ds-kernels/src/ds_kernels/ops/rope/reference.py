"""The specification of rope: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._reference import wide

__all__ = ["rope", "rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pair i of the first 2 * half elements of each row by its angle; the rest passes through.

    Args:
        x: [batch, heads, seq, dim].
        cos, sin: [1 or batch, seq, half], fp32 (fp64 for fp64).
        interleaved: pair i is (x[2i], x[2i + 1]), otherwise (x[i], x[half + i]).

    Returns:
        Tensor with x's dtype, and with its strides where x is dense.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rows = wide(x)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (
        slice(0, half), slice(half, 2 * half)
    )  # fmt: skip
    a, b = rows[..., first], rows[..., second]
    out = torch.empty_like(x)
    out[..., first] = (a * cos - b * sin).to(x.dtype)
    out[..., second] = (b * cos + a * sin).to(x.dtype)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """`rotate` for queries and keys."""
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
