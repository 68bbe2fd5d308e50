"""moe_gate on CPU: one pass over the logits and a counting sort in numba; torch's sort without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.moe_gating import reference

__all__ = ["gate", "gate_backward", "sort"]

NUM_PARTIALS = 16
"""Sums over tokens are taken over this many fixed groups of them, so that threads do not change their bits."""


def _code(logits: Tensor) -> int | None:
    return CODES.get(logits.dtype) if HAS_NUMBA and logits.numel() else None


def gate(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    code = _code(logits)
    if code is None:
        return reference.gate(logits, top_k, renormalize)
    from ds_kernels.ops.moe_gating import cpu_numba

    tokens, num_experts = logits.shape
    weights, experts = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
    lse, partial = torch.empty(tokens), torch.empty(NUM_PARTIALS, num_experts + 1)
    launch(
        cpu_numba.gate, logits, weights, experts, lse, partial, tokens, num_experts, top_k, int(renormalize), code,
        items=NUM_PARTIALS,
    )  # fmt: skip
    sums = partial.sum(0) / tokens
    return weights, experts, sums[:num_experts].clone(), sums[num_experts].clone(), lse


def gate_backward(
    grad_weights: Tensor, grad_mean: Tensor, grad_z: Tensor, logits: Tensor, weights: Tensor, experts: Tensor,
    lse: Tensor, renormalize: bool,
) -> Tensor:  # fmt: skip
    """As the reference."""
    code = _code(logits)
    if code is None:
        return reference.gate_backward(grad_weights, grad_mean, grad_z, logits, weights, experts, lse, renormalize)
    from ds_kernels.ops.moe_gating import cpu_numba

    (tokens, num_experts), top_k = logits.shape, weights.shape[1]
    grad = torch.empty_like(logits)
    launch(
        cpu_numba.gate_backward, grad_weights, grad_mean / tokens, logits, weights, experts, lse, grad,
        tokens, num_experts, top_k, int(renormalize), code, float(grad_z) / tokens,
        items=tokens, grain=max(1, (1 << 12) // num_experts),
    )  # fmt: skip
    return grad


def sort(
    experts: Tensor, priority: Tensor | None, num_experts: int, capacity: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    if priority is not None or not HAS_NUMBA or not experts.numel():
        return reference.sort(experts, priority, num_experts, capacity, padded)
    from ds_kernels.ops.moe_gating import cpu_numba

    (tokens, top_k), num_rows = experts.shape, num_experts * capacity if padded else experts.numel()
    slots, sources = torch.empty_like(experts), experts.new_empty(num_rows)
    ends, counts = experts.new_empty(num_experts, dtype=torch.int32), experts.new_empty(num_experts)
    launch(
        cpu_numba.sort, experts.contiguous(), slots, sources, ends, counts,
        tokens, top_k, num_experts, capacity, int(padded), num_rows, items=1,
    )  # fmt: skip
    return slots, sources, ends, counts
