"""swiglu and geglu in Triton: one program per block of elements."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build
from ds_kernels.ops.glu import reference

__all__ = ["activation", "builds", "glu", "glu_backward"]

BLOCK = 1024
"""Elements per program."""


@triton.jit
def activation(x, KIND: tl.constexpr):
    """`(act(x), act'(x))`, as the reference's; KIND is 0 for silu, 1 for gelu's tanh form, 2 for gelu."""
    if KIND == 2:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 0:
        share = tl.sigmoid(x)
        value = x * share
        slope = share + value * (1.0 - share)
    else:
        near = tl.minimum(tl.maximum(x, -32.0), 32.0)
        square = near * near
        share = tl.sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * square))
        value = x * share
        slope = share + share * (1.0 - share) * near * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return value, slope


@triton.jit
def _forward(gate, up, out, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    value, _ = activation(tl.load(gate + at, mask, other=0.0).to(tl.float32), KIND)
    result = value * tl.load(up + at, mask, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask)


@triton.jit
def _backward(grad, gate, up, grad_gate, grad_up, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    above = tl.load(grad + at, mask, other=0.0).to(tl.float32)
    value, slope = activation(tl.load(gate + at, mask, other=0.0).to(tl.float32), KIND)
    beside = tl.load(up + at, mask, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (above * beside * slope).to(grad_gate.dtype.element_ty), mask)
    tl.store(grad_up + at, (above * value).to(grad_up.dtype.element_ty), mask)


def glu(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """As the reference, which takes fp64."""
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return reference.glu(gate, up, kind)
    out = torch.empty_like(gate)
    _forward[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), kind, BLOCK)
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return reference.glu_backward(grad, gate, up, kind)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _backward[(triton.cdiv(gate.numel(), BLOCK),)](grad, gate, up, grad_gate, grad_up, gate.numel(), kind, BLOCK)
    return grad_gate, grad_up


def builds() -> Iterator[Build]:
    """Each activation, in one dtype each."""
    for name, kind in (("bf16", reference.SILU), ("fp16", reference.GELU_TANH), ("fp32", reference.GELU_ERF)):
        constants = {"KIND": kind, "BLOCK": BLOCK}
        inputs = {"gate": f"*{name}", "up": f"*{name}", "numel": "i32"}
        yield Build(_forward, {**inputs, "out": f"*{name}"}, constants)
        outputs = dict.fromkeys(("grad", "grad_gate", "grad_up"), f"*{name}")
        yield Build(_backward, {**inputs, **outputs}, constants)
