"""cross_entropy: -log softmax(logits)[target], with label smoothing and the z-loss of PaLM.

Source: label smoothing, Szegedy et al. 2015 (arXiv:1512.00567); z-loss, Chowdhery et al. 2022, "PaLM", section 5
(arXiv:2204.02311): z * log(Z)^2 keeps the softmax normaliser near 1. The formulas are in `reference`.
Limit: memory. Forward reads the logits, backward reads them and writes their gradient: 1 and 2 passes over
`rows * vocabulary * itemsize` bytes; nothing of their size is kept but the logits themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.cross_entropy import cpu, reference

__all__ = ["REDUCTIONS", "check_options", "check_target", "cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The cross entropy of logits against class indices.

    Args:
        logits: [..., vocabulary], fp32, bf16, fp16 or fp64; any strides.
        target: [...], int64: a class each, or `ignore_index`.
        ignore_index: rows with this target have no loss and no gradient, and are not counted by "mean".
        label_smoothing: this share of the target distribution is spread evenly over all classes; in [0, 1).
        z_loss: weight of log(sum(exp(logits)))^2, added to each row's loss.
        reduction: "mean" over the rows that are not ignored (NaN, with gradient 0, if all are), "sum", or "none".

    Returns:
        The loss in fp32 (fp64 for fp64), also for 16-bit logits: a scalar, or [...] with reduction "none".
        Its gradient has the dtype of the logits.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit; on CPU also a target that is no class.
            On a GPU targets are not looked at, for that would wait for the device; one out of range gives NaN.
    """
    check_dtype("cross_entropy", "logits", logits)
    require(
        logits.dim() >= 1 and logits.shape[-1] > 0,
        f"cross_entropy: logits have shape {tuple(logits.shape)}; expected [..., vocabulary] with at least one class",
    )
    check_target("cross_entropy", logits, target, logits.shape[:-1])
    check_options("cross_entropy", label_smoothing, z_loss, reduction)
    rows = target.reshape(-1).contiguous()
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    loss: Tensor = _FORWARD(flat, rows, ignore_index, float(label_smoothing), float(z_loss))[0]
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (rows != ignore_index).sum()


def check_target(op: str, x: Tensor, target: Tensor, shape: torch.Size) -> None:
    """Targets are int64, of the rows' shape, on x's device."""
    check_dtype(op, "target", target, (torch.int64,))
    check_device(op, x, target=target)
    require(
        target.shape == shape,
        f"{op}: target has shape {tuple(target.shape)}; expected {tuple(shape)}, one class per row",
    )


def check_options(op: str, label_smoothing: float, z_loss: float, reduction: str) -> None:
    """The options that both cross entropies share."""
    require(0.0 <= label_smoothing < 1.0, f"{op}: label_smoothing is {label_smoothing}; expected 0 <= it < 1")
    require(0.0 <= z_loss < float("inf"), f"{op}: z_loss is {z_loss}; expected a finite number, 0 or more")
    require(reduction in REDUCTIONS, f"{op}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")


def _forward(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    backend = backend_for(logits)
    if backend == "triton":
        from ds_kernels.ops.cross_entropy import triton

        return triton.cross_entropy(logits, target, ignore_index, smoothing, z_loss)
    if backend == "cpu":
        return cpu.cross_entropy(logits, target, ignore_index, smoothing, z_loss)
    return reference.cross_entropy(logits, target, ignore_index, smoothing, z_loss)


def _forward_fake(logits: Tensor, _target: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)


def _backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    backend = backend_for(logits)
    if backend == "triton":
        from ds_kernels.ops.cross_entropy import triton

        return triton.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)
    if backend == "cpu":
        return cpu.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)
    return reference.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)


def _backward_fake(_grad: Tensor, logits: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, lse = ctx.saved_tensors
    return _BACKWARD(grad.contiguous(), logits, target, lse, *ctx.options), None, None, None, None


_BACKWARD = Op(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, int ignore_index, float smoothing, "
    "float z_loss) -> Tensor",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, float smoothing, float z_loss) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
