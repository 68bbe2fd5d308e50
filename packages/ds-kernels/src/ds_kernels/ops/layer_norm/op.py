"""layer_norm: y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias along the last dimension.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450).
Limit: memory. Forward reads x and writes y, backward reads grad and x and writes grad_x: 2 and 3 passes over the
tensor (`rows * dim * itemsize` bytes each), with two fp32 per row beside them. A residual adds 2 passes to forward
(read it, write the sum; apart, the addition alone takes 3) and at most 1 to backward (the gradient of the sum).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_last_dim, check_like
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op

__all__ = ["layer_norm"]


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of x, or of x + residual, to mean 0 and variance 1.

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64; any strides.
        weight: [dim], any float dtype, or None for ones.
        bias: [dim], any float dtype, or None for zeros.
        eps: added to the variance (which divides by dim).
        residual: like x, or None.

    Returns:
        y like x, contiguous; with a residual `(y, x + residual)`, the sum rounded to x's dtype before it is
        normalised, as two operations would. In fp32 (fp64 for fp64), rounded once at the end.

    Raises:
        KernelArgumentError: an argument of another shape or device, or a dtype that is not a float.
    """
    check_last_dim("layer_norm", x, weight=weight, bias=bias)
    check_dtype("layer_norm", "x", x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_dtype("layer_norm", name, vector)
    check_device("layer_norm", x, weight=weight, bias=bias, residual=residual)
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    if residual is None:
        y: Tensor = _FORWARD(x.contiguous(), None, weight, bias, eps)[0]
        return y
    check_like("layer_norm", "residual", residual, "x", x)
    y, total, _, _ = _FORWARD(x.contiguous(), residual.contiguous(), weight, bias, eps)
    return y, total


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]
    outputs = implementation("layer_norm", x).layer_norm(x, residual, weight, bias, eps)
    return outputs


def _forward_fake(
    x: Tensor, residual: Tensor | None, _weight: Tensor | None, _bias: Tensor | None, _eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=exact) for _ in range(2))
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), mean, rstd


def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor]
    gradients = implementation("layer_norm", x).layer_norm_backward(grad, grad_total, x, weight, mean, rstd)
    return gradients


def _backward_fake(
    _grad: Tensor, _grad_total: Tensor | None, x: Tensor, _weight: Tensor | None, mean: Tensor, _rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(x.shape[-1]), mean.new_empty(x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.has_residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.has_residual else (total,)))
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _mean: Any, _rstd: Any
) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad.contiguous()
    after = grad_total.contiguous() if grad_total is not None and ctx.has_residual else None
    grad_x, grad_weight, grad_bias = _BACKWARD(grad, after, x, weight, mean, rstd)
    return (
        grad_x,
        grad_x if ctx.has_residual else None,
        None if weight is None else grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        None,
    )


_BACKWARD = Op(
    "layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
