"""The specification of swiglu and geglu: plain torch, in the precision of its inputs (at least fp32)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_kernels._reference import wide

__all__ = ["GELU_ERF", "GELU_TANH", "SILU", "activation", "glu", "glu_backward"]

SILU, GELU_TANH, GELU_ERF = 0, 1, 2
"""Activations of the gate."""


def activation(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """`(act(x), act'(x))`.

    With z the argument of the sigmoid, silu and gelu's tanh form are x * sigmoid(z): z = x, and
    z = 2 sqrt(2 / pi) (x + 0.044715 x^3) because (1 + tanh(u)) / 2 = sigmoid(2u). Beyond |x| = 32 the sigmoid is 0 or
    1 to the last bit and the slope of z no longer counts, which keeps its powers of x from overflowing.
    """
    if kind == GELU_ERF:
        cdf = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if kind == SILU:
        share = torch.sigmoid(x)
        return x * share, share + x * share * (1 - share)
    near = x.clamp(-32, 32)
    scale = 2 * math.sqrt(2 / math.pi)
    share = torch.sigmoid(scale * near * (1 + 0.044715 * near * near))
    return x * share, share + near * share * (1 - share) * scale * (1 + 3 * 0.044715 * near * near)


def glu(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) * up, rounded once to gate's dtype."""
    return (activation(wide(gate), kind)[0] * wide(up)).to(gate.dtype)


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """`(grad_gate, grad_up)`: grad * up * act'(gate) and grad * act(gate)."""
    grad = wide(grad)
    value, slope = activation(wide(gate), kind)
    return (grad * wide(up) * slope).to(gate.dtype), (grad * value).to(up.dtype)
