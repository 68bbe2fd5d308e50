"""linear_cross_entropy: the cross entropy of `x @ weight.T + bias`, whose logits are never materialised.

Source: chunks of rows with the gradients computed in the forward pass, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989); statistics of the softmax alone and logits made again in the backward pass, as in Wijmans et al.
2024, "Cut Your Losses" (arXiv:2411.09009). Formulas: the reference of cross_entropy.
Limit: arithmetic. Three products of `2 * rows * vocabulary * dim` operations for loss and gradients (four with
reduction "none" or in fp16), one for the loss alone; memory beside the gradients: one chunk of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.cross_entropy.op import check_options, check_target
from ds_kernels.ops.linear_cross_entropy import cpu, reference
from ds_kernels.ops.linear_cross_entropy.cpu import Terms

__all__ = ["linear_cross_entropy"]

OP = "linear_cross_entropy"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(F.linear(x, weight, bias), target, ...)` without the memory of its logits.

    With reduction "mean" or "sum", in fp32 and bf16, the gradients are computed together with the loss (if any is
    wanted) and wait for backward, which only scales them: forward takes the time of both passes. Otherwise, and in a
    second backward pass through the same graph, the logits are computed again. Under torch.autocast inputs are cast
    as F.linear casts them.

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64.
        weight: [vocabulary, dim], of x's dtype: the layer's, or that of a tied embedding.
        target: [...], int64: a class each, or `ignore_index`.
        bias: [vocabulary], of x's dtype, or None.
        ignore_index, label_smoothing, z_loss, reduction: as in `cross_entropy`.

    Returns:
        The loss in fp32 (fp64 for fp64): a scalar, or [...] with reduction "none". Logits are rounded to x's dtype,
        as F.linear's are; sums over rows and classes are in fp32.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit; on CPU also a target that is no class.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, target, bias)
    check_options(OP, label_smoothing, z_loss, reduction)
    rows, classes = x.reshape(-1, x.shape[-1]).contiguous(), target.reshape(-1).contiguous()
    weight = weight.contiguous()
    options = (ignore_index, float(label_smoothing), float(z_loss))
    need = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    if reduction != "none" and any(need) and x.dtype in (torch.float32, torch.bfloat16):
        total: Tensor = _AT_ONCE(rows, weight, bias, classes, *options, *need)[0]
    else:
        losses: Tensor = _BY_ROWS(rows, weight, bias, classes, *options)[0]
        if reduction == "none":
            return losses.view(target.shape)
        total = losses.sum()
    if reduction == "sum":
        return total
    count = (classes != ignore_index).sum()
    # not total / count, whose gradient for no rows is infinite: 0 * inf would make the gradients NaN
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _check(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    check_dtype(OP, "x", x)
    check_device(OP, x, weight=weight, bias=bias)
    require(
        x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.numel() > 0,
        f"{OP}: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}; "
        "expected [vocabulary, dim] and [..., dim], neither size zero",
    )
    require(
        bias is None or bias.shape == weight.shape[:1],
        f"{OP}: bias has shape {None if bias is None else tuple(bias.shape)}; expected ({weight.shape[0]},)",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(
            tensor is None or tensor.dtype == x.dtype,
            f"{OP}: {name} is of dtype {None if tensor is None else tensor.dtype}; expected {x.dtype}, that of x",
        )
    check_target(OP, x, target, x.shape[:-1])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    backend, terms = backend_for(x), Terms(ignore_index, smoothing, z_loss)
    if backend == "triton":
        from ds_kernels.ops.linear_cross_entropy import triton

        return triton.linear_cross_entropy(x, weight, bias, target, terms)
    if backend == "cpu":
        return cpu.linear_cross_entropy(x, weight, bias, target, terms)
    return reference.linear_cross_entropy(x, weight, bias, target, ignore_index, smoothing, z_loss)


def _forward_fake(x: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, ignore_index: int,
    smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backend, terms = backend_for(x), Terms(ignore_index, smoothing, z_loss)
    if backend == "triton":
        from ds_kernels.ops.linear_cross_entropy import triton

        return triton.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, terms)
    if backend == "cpu":
        return cpu.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, terms)
    return reference.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, ignore_index, smoothing, z_loss)


def _backward_fake(
    _grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x), torch.empty_like(weight), grad_bias


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients_by_rows(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, lse = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _BACKWARD(grad.contiguous(), x, weight, bias, target, lse, *ctx.options)
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None, None, None


def _loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, z_loss: float,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backend, terms, need = backend_for(x), Terms(ignore_index, smoothing, z_loss), (need_x, need_weight, need_bias)
    if backend == "triton":
        from ds_kernels.ops.linear_cross_entropy import triton

        return triton.loss_and_gradients(x, weight, bias, target, terms, need)
    if backend == "cpu":
        return cpu.loss_and_gradients(x, weight, bias, target, terms, need)
    loss, lse = _forward(x, weight, bias, target, ignore_index, smoothing, z_loss)
    gradients = _backward(torch.ones_like(loss), x, weight, bias, target, lse, ignore_index, smoothing, z_loss)
    kept = [value if wanted else x.new_empty(0) for value, wanted in zip(gradients, need, strict=True)]
    return loss.sum(), lse, kept[0], kept[1], kept[2]


def _loss_and_gradients_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, _target: Tensor, _ignore_index: int, _smoothing: float,
    _z_loss: float, *need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lse = x.new_empty(x.shape[0], dtype=torch.float32)
    gradients = [
        torch.empty_like(tensor) if wanted and tensor is not None else x.new_empty(0)
        for tensor, wanted in zip((x, weight, bias), need, strict=True)
    ]
    return x.new_empty((), dtype=torch.float32), lse, gradients[0], gradients[1], gradients[2]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, target, output[1])
    ctx.gradients = output[2:]  # not among the saved tensors: backward scales them in place and gives them away
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the weight's size would be made for its gradient's gradient


def _scaled_gradients(ctx: Any, grad: Tensor, *_grads: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, lse = ctx.saved_tensors
    *options, need_x, need_weight, need_bias = ctx.options
    need = (need_x, need_weight, need_bias)
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # backward through the same graph once more: the first one gave its tensors away
        gradients = _BACKWARD(grad.expand_as(lse).contiguous(), x, weight, bias, target, lse, *options)
    elif not (type(grad) is Tensor and grad.is_cpu and float(grad) == 1.0):
        for tensor in gradients:
            tensor.mul_(grad)
    found = [value if wanted else None for value, wanted in zip(gradients, need, strict=True)]
    return (*found, *[None] * 7)


_BACKWARD = Op(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse, "
    "int ignore_index, float smoothing, float z_loss) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_BY_ROWS = Op(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float smoothing, "
    "float z_loss) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save_rows,
    backward=_gradients_by_rows,
)
_AT_ONCE = Op(
    "linear_cross_entropy_at_once(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float smoothing, float z_loss, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_and_gradients,
    fake=_loss_and_gradients_fake,
    setup_context=_save_gradients,
    backward=_scaled_gradients,
)
