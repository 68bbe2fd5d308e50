"""bias_gelu: y = gelu(x + bias), the activation between the two products of a feed-forward layer.

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units" (arXiv:1606.08415).
Limit: memory. Forward reads x and writes y, backward reads grad and x and writes grad_x: 2 and 3 passes of
`rows * dim * itemsize` bytes each. The sum x + bias is not kept but computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_last_dim, require
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op
from ds_kernels.ops.glu.reference import GELU_ERF, GELU_TANH

__all__ = ["bias_gelu"]


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x + bias).

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64; any strides.
        bias: [dim], any float dtype, or None for zeros.
        approximate: "none" for x * (1 + erf(x / sqrt(2))) / 2 (BERT), "tanh" for its tanh form (GPT-2), as torch's.

    Returns:
        Tensor like x, contiguous. Computed in fp32 (fp64 for fp64), the sum included, rounded once.

    Raises:
        KernelArgumentError: bias of another shape or device, a dtype that is not a float, another approximate.
    """
    check_last_dim("bias_gelu", x, bias=bias)
    check_dtype("bias_gelu", "x", x)
    if bias is not None:
        check_dtype("bias_gelu", "bias", bias)
        check_device("bias_gelu", x, bias=bias)
    require(
        approximate in ("none", "tanh"),
        f"bias_gelu: approximate is {approximate!r}; supported are 'none' (erf) and 'tanh'",
    )
    bias = None if bias is None else bias.contiguous()
    y: Tensor = _FORWARD(x.contiguous(), bias, GELU_TANH if approximate == "tanh" else GELU_ERF)
    return y


def _forward(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    y: Tensor = implementation("bias_gelu", x).bias_gelu(x, bias, kind)
    return y


def _forward_fake(x: Tensor, _bias: Tensor | None, _kind: int) -> Tensor:
    return torch.empty_like(x)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = implementation("bias_gelu", x).bias_gelu_backward(grad, x, bias, kind)
    return gradients


def _backward_fake(_grad: Tensor, x: Tensor, _bias: Tensor | None, _kind: int) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(x.shape[-1], dtype=exact)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _BACKWARD(grad.contiguous(), x, bias, ctx.kind)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype), None


_BACKWARD = Op(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, int kind) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "bias_gelu(Tensor x, Tensor? bias, int kind) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
