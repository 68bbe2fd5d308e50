"""rms_norm: y = x / sqrt(mean(x^2) + eps) * (offset + weight) along the last dimension.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
Limit: memory. Forward reads x and writes y, backward reads grad and x and writes grad_x: 2 and 3 passes over the
tensor (`rows * dim * itemsize` bytes each), with one fp32 per row beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_last_dim
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """Normalise the last dimension of x by its root mean square.

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64; any strides.
        weight: [dim], any float dtype, or None for none.
        eps: added to the mean square.
        offset: added to the weight: 1.0 for Gemma, whose weights are stored around zero.

    Returns:
        Tensor like x. The sum and the scaling are in fp32 (fp64 for fp64), rounded once at the end.

    Raises:
        KernelArgumentError: weight of another shape or device, or a dtype that is not a float.
    """
    check_last_dim("rms_norm", x, weight=weight)
    check_dtype("rms_norm", "x", x)
    if weight is not None:
        check_dtype("rms_norm", "weight", weight)
        check_device("rms_norm", x, weight=weight)
    y: Tensor = _FORWARD(x.contiguous(), weight, eps, offset)[0]
    return y


def _forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "triton":
        from ds_kernels.ops.rms_norm import triton

        return triton.rms_norm(x, weight, eps, offset)
    if backend == "cpu":
        return cpu.rms_norm(x, weight, eps, offset)
    return reference.rms_norm(x, weight, eps, offset)


def _forward_fake(x: Tensor, _weight: Tensor | None, _eps: float, _offset: float) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


def _backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "triton":
        from ds_kernels.ops.rms_norm import triton

        return triton.rms_norm_backward(grad, x, weight, rstd, offset)
    if backend == "cpu":
        return cpu.rms_norm_backward(grad, x, weight, rstd, offset)
    return reference.rms_norm_backward(grad, x, weight, rstd, offset)


def _backward_fake(
    _grad: Tensor, x: Tensor, weight: Tensor | None, _rstd: Tensor, _offset: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _BACKWARD(grad.contiguous(), x, weight, rstd, ctx.offset)
    return grad_x, None if weight is None else grad_weight, None, None


_BACKWARD = Op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, float offset) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
