"""The specification of bias_dropout_residual: plain torch, and the random numbers that every backend agrees on.

The random word of element (row, column) is a hash of the seed, the row and the column, so that backward computes the
mask again instead of keeping it, and so that no backend, layout of threads or tile changes it:

    key0 = mix(low half of seed ^ 0x9E3779B9)         key1 = mix(high half of seed ^ key0)
    row0 = mix(row ^ key0)                            row1 = mix(row0 + key1)
    word = mix(mix(column ^ row0) ^ row1)             (unsigned 32-bit arithmetic)

An element is kept where word >= round(p * 2^32) (at most 2^32 - 1). `mix` is Wellons' hash "lowbias32".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._reference import column_sum, wide

__all__ = ["bias_dropout_residual", "bias_dropout_residual_backward", "keep", "scale_of", "threshold_of"]

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Of 32-bit words in int64, whose products wrap around harmlessly: only their low halves are used."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def threshold_of(p: float) -> int:
    """The first random word that keeps its element."""
    return min(round(p * 2**32), _WORD)


def scale_of(p: float) -> float:
    """What kept elements are multiplied with: 1 / (1 - p), and 0 where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def keep(rows: int, dim: int, seed: Tensor, p: float) -> Tensor:
    """[rows, dim] booleans: which elements stay."""
    halves = seed.reshape(())
    key0 = _mix((halves & _WORD) ^ 0x9E3779B9)
    key1 = _mix(((halves >> 32) & _WORD) ^ key0)
    row0 = _mix(torch.arange(rows, device=seed.device) ^ key0).unsqueeze(1)
    row1 = _mix((row0 + key1) & _WORD)
    return _mix(_mix(torch.arange(dim, device=seed.device) ^ row0) ^ row1) >= threshold_of(p)


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if p == 0 or x.numel() == 0:
        return x.clone()  # an operation returns no input of its own
    kept = keep(x.numel() // x.shape[-1], x.shape[-1], seed, p).view(x.shape)
    return torch.where(kept, x * scale_of(p), 0.0)


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """residual + dropout(x + bias), rounded once to x's dtype."""
    y = _drop(wide(x) if bias is None else wide(x) + wide(bias), seed, p)
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def bias_dropout_residual_backward(grad: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """`(grad_x, grad_bias)`: grad where it was kept, scaled, and its sum over the rows, fp32 (fp64 for fp64)."""
    grad_x = _drop(wide(grad), seed, p)
    return grad_x.to(grad.dtype), column_sum(grad_x)
