"""moe_dispatch and moe_combine on CPU: one pass over the rows in numba; torch's indexing without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.moe_dispatch import reference

__all__ = ["rows_of_tokens", "tokens_of_rows", "weight_gradient"]


def _code(*tensors: Tensor) -> int | None:
    usable = HAS_NUMBA and all(tensor.numel() for tensor in tensors)
    return CODES.get(tensors[0].dtype) if usable else None


def _grain(hidden: int) -> int:
    """Rows handed out at a time: about 16K elements, some microseconds of work."""
    return max(1, (1 << 14) // hidden)


def rows_of_tokens(x: Tensor, sources: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """As the reference."""
    code = _code(x, sources)
    if code is None:
        return reference.rows_of_tokens(x, sources, weights, top_k)
    from ds_kernels.ops.moe_dispatch import cpu_numba

    rows, hidden = sources.shape[0], x.shape[1]
    out = x.new_empty(rows, hidden)
    if weights is None:
        words = hidden * x.itemsize // 2
        launch(cpu_numba.copy_rows, x, sources, out, words, top_k, items=rows, grain=_grain(hidden))
    else:
        launch(
            cpu_numba.scale_rows, x, sources, weights.contiguous(), out, hidden, top_k, weights.numel(), code,
            items=rows, grain=_grain(hidden),
        )  # fmt: skip
    return out


def tokens_of_rows(y: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """As the reference."""
    code = _code(y, slots)
    if code is None:
        return reference.tokens_of_rows(y, slots, weights)
    from ds_kernels.ops.moe_dispatch import cpu_numba

    (tokens, top_k), hidden = slots.shape, y.shape[1]
    factors = torch.ones(slots.shape) if weights is None else weights.contiguous()
    out = y.new_empty(tokens, hidden)
    launch(cpu_numba.sum_rows, y, slots, factors, out, hidden, top_k, code, items=tokens, grain=_grain(hidden))
    return out


def weight_gradient(grad: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    """As the reference."""
    code = _code(grad, y, slots)
    if code is None:
        return reference.weight_gradient(grad, y, slots)
    from ds_kernels.ops.moe_dispatch import cpu_numba

    (tokens, top_k), hidden = slots.shape, y.shape[1]
    out = torch.empty(slots.shape)
    launch(cpu_numba.dot_rows, grad, y, slots, out, hidden, top_k, code, items=tokens, grain=_grain(hidden))
    return out
