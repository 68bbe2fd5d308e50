"""The specification of moe_dispatch and moe_combine: gathers in plain torch, summed in fp32 (fp64 for fp64).

Both directions are gathers, by `sources` (row -> choice) or by `slots` (choice -> row), so that no two programs write
to one place and sums have a fixed order. A choice is t * k + j: choice j of token t. -1 means none.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rows_of_tokens", "tokens_of_rows", "weight_gradient"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rows_of_tokens(x: Tensor, sources: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """`out[r] = weights[sources[r]] * x[sources[r] // k]`, zero where the source is -1; [rows, hidden]."""
    if not x.shape[0]:
        return x.new_zeros(sources.shape[0], x.shape[1])
    choice = sources.clamp(min=0)
    rows = x[choice // top_k]
    if weights is not None:
        rows = (_wide(rows) * weights.flatten()[choice].unsqueeze(1)).to(x.dtype)
    return rows.masked_fill((sources < 0).unsqueeze(1), 0)


def tokens_of_rows(y: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """`out[t] = sum over j of weights[t, j] * y[slots[t, j]]`, without the choices of slot -1; [tokens, hidden]."""
    total = _wide(y.new_zeros(slots.shape[0], y.shape[1]))
    for j in range(slots.shape[1] if y.shape[0] else 0):
        slot = slots[:, j]
        rows = _wide(y[slot.clamp(min=0)]).masked_fill((slot < 0).unsqueeze(1), 0)
        total = total + (rows if weights is None else rows * weights[:, j].unsqueeze(1))
    return total.to(y.dtype)


def weight_gradient(grad: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    """`out[t, j] = grad[t] . y[slots[t, j]]`, zero for slot -1; [tokens, k], fp32 (fp64 for fp64)."""
    out = _wide(grad.new_zeros(slots.shape))
    for j in range(slots.shape[1] if y.shape[0] else 0):
        slot = slots[:, j]
        dot = (_wide(grad) * _wide(y[slot.clamp(min=0)])).sum(1)
        out[:, j] = dot.masked_fill(slot < 0, 0)
    return out
