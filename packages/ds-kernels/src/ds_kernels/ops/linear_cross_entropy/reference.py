"""The specification of linear_cross_entropy: the logits of a linear layer, materialised, and their cross entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ds_kernels.ops.cross_entropy import reference as dense

__all__ = ["linear_cross_entropy", "linear_cross_entropy_backward"]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`(loss, lse)` [rows] in fp32 (fp64 for fp64) of the logits x @ weight.T + bias, which have x's dtype."""
    logits = functional.linear(x, weight, bias)
    return dense.cross_entropy(logits, target, ignore_index, smoothing, z_loss)


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, ignore_index: int,
    smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias (empty without one) from the losses' gradient [rows] and the saved lse."""
    logits = functional.linear(x, weight, bias)
    grad_logits = dense.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)
    grad_bias = x.new_empty(0) if bias is None else dense.wide(grad_logits).sum(0).to(bias.dtype)
    return grad_logits @ weight, grad_logits.t() @ x, grad_bias
