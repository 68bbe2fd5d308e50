"""rms_norm: y = x / sqrt(mean(x^2) + eps) * (offset + weight) along the last dimension.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
Limit: memory. Forward reads x and writes y, backward reads grad and x and writes grad_x: 2 and 3 passes over the
tensor (`rows * dim * itemsize` bytes each), with one fp32 per row beside them. A residual adds 2 passes to forward
(read it, write the sum; apart, the addition alone takes 3) and at most 1 to backward (the gradient of the sum).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_last_dim, check_like
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, residual: None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of x, or of x + residual, by its root mean square.

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64; any strides.
        weight: [dim], any float dtype, or None for none.
        eps: added to the mean square.
        offset: added to the weight: 1.0 for Gemma, whose weights are stored around zero.
        residual: like x, or None.

    Returns:
        y like x, contiguous; with a residual `(y, x + residual)`, the sum rounded to x's dtype before it is
        normalised, as two operations would. In fp32 (fp64 for fp64), rounded once at the end.

    Raises:
        KernelArgumentError: an argument of another shape or device, or a dtype that is not a float.
    """
    check_last_dim("rms_norm", x, weight=weight)
    check_dtype("rms_norm", "x", x)
    if weight is not None:
        check_dtype("rms_norm", "weight", weight)
    check_device("rms_norm", x, weight=weight, residual=residual)
    weight = None if weight is None else weight.contiguous()
    if residual is None:
        y: Tensor = _FORWARD(x.contiguous(), None, weight, eps, offset)[0]
        return y
    check_like("rms_norm", "residual", residual, "x", x)
    y, total, _ = _FORWARD(x.contiguous(), residual.contiguous(), weight, eps, offset)
    return y, total


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor]
    outputs = implementation("rms_norm", x).rms_norm(x, residual, weight, eps, offset)
    return outputs


def _forward_fake(
    x: Tensor, residual: Tensor | None, _weight: Tensor | None, _eps: float, _offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), rstd


def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor]
    gradients = implementation("rms_norm", x).rms_norm_backward(grad, grad_total, x, weight, rstd, offset)
    return gradients


def _backward_fake(
    _grad: Tensor, _grad_total: Tensor | None, x: Tensor, weight: Tensor | None, _rstd: Tensor, _offset: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, _, ctx.offset = inputs
    _, total, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.mark_non_differentiable(rstd, *(() if ctx.has_residual else (total,)))
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _rstd: Any) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad.contiguous()
    after = grad_total.contiguous() if grad_total is not None and ctx.has_residual else None
    grad_x, grad_weight = _BACKWARD(grad, after, x, weight, rstd, ctx.offset)
    return grad_x, grad_x if ctx.has_residual else None, None if weight is None else grad_weight, None, None


_BACKWARD = Op(
    "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor rstd, float offset)"
    " -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
