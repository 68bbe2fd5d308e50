"""swiglu and geglu: out = act(gate) * up, the two branches of a gated feed-forward layer.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202).
Limit: memory. Forward reads gate and up and writes out, backward reads grad, gate and up and writes their two
gradients: 3 and 5 passes over a tensor (`numel * itemsize` bytes each). Only the inputs are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_like, require
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op
from ds_kernels.ops.glu.reference import GELU_ERF, GELU_TANH, SILU

__all__ = ["geglu", "swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x).

    Args:
        gate: any shape, fp32, bf16, fp16 or fp64; any strides.
        up: as gate: same shape, dtype and device.

    Returns:
        Contiguous tensor of gate's shape and dtype; computed in fp32 (fp64 for fp64), rounded once.

    Raises:
        KernelArgumentError: shapes, dtypes or devices differ, or a dtype that is not a float.
    """
    return _glu("swiglu", gate, up, SILU)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up.

    Args:
        gate, up: as in `swiglu`.
        approximate: "none" for x * (1 + erf(x / sqrt(2))) / 2, "tanh" for Gemma's tanh form of it, as in torch's gelu.

    Returns:
        As `swiglu`.

    Raises:
        KernelArgumentError: as `swiglu`, or another word for approximate.
    """
    require(
        approximate in ("none", "tanh"),
        f"geglu: approximate is {approximate!r}; supported are 'none' (erf) and 'tanh'",
    )
    return _glu("geglu", gate, up, GELU_TANH if approximate == "tanh" else GELU_ERF)


def _glu(op: str, gate: Tensor, up: Tensor, kind: int) -> Tensor:
    check_dtype(op, "gate", gate)
    check_device(op, gate, up=up)
    check_like(op, "up", up, "gate", gate)
    out: Tensor = _FORWARD(gate.contiguous(), up.contiguous(), kind)
    return out


def _forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    out: Tensor = implementation("glu", gate).glu(gate, up, kind)
    return out


def _forward_fake(gate: Tensor, _up: Tensor, _kind: int) -> Tensor:
    return torch.empty_like(gate)


def _backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = implementation("glu", gate).glu_backward(grad, gate, up, kind)
    return gradients


def _backward_fake(_grad: Tensor, gate: Tensor, up: Tensor, _kind: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = _BACKWARD(grad.contiguous(), gate, up, ctx.kind)
    return grad_gate, grad_up, None


_BACKWARD = Op(
    "glu_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)", _backward, fake=_backward_fake
)
_FORWARD = Op(
    "glu(Tensor gate, Tensor up, int kind) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
