"""linear: y = x @ weight.T + bias, for weights in bf16 or quantised to 8 or 4 bits in groups.

Weight-only quantisation is W8A16 and W4A16; with `activation_bits=8` the activations are quantised as well, per row and
group (W8A8, W4A8). Sources: Dettmers et al. 2022, "LLM.int8()" (arXiv:2208.07339); Frantar et al. 2023, "GPTQ"
(arXiv:2210.17323) for groups; Yao et al. 2022, "ZeroQuant" (arXiv:2206.01861) for activations per row.

Limit: for few rows memory, `QuantizedWeight.nbytes` (bits / 8 + 2 / group_size bytes per weight) per call; for many
rows arithmetic, 2 * rows * outputs * columns operations. On CPU an activation of bf16 costs two byte products per
weight, one of fp32 three, one of 8 bits one. A core that finishes one vector of 64 such products per cycle at 3.7 GHz
reads 8-bit codes for eight rows at 14.7 GB/s at most (4-bit ones at 7.3; twice that with activations of 8 bits), bf16
weights at 29: eight rows of quantised weights are bound by arithmetic (benchmarks/results/kernels_linear.jsonl).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, check_device, check_dtype
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.errors import KernelArgumentError
from ds_kernels.ops.linear import cpu, reference
from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["bind_linear", "linear"]


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, *, activation_bits: int | None = None
) -> Tensor:
    """Multiply by a weight matrix as `torch.nn.functional.linear` does.

    Args:
        x: [..., columns], fp32, bf16, fp16 or fp64; any strides.
        weight: [outputs, columns] of x's dtype, or a `QuantizedWeight`.
        bias: [outputs], a float dtype, or None.
        activation_bits: 8 quantises x as well, per row and group of columns (quantised weights only); None does not.

    Returns:
        [..., outputs] of x's dtype; summed in fp32 (fp64 for fp64) and rounded once. On CPU, activations that meet
        quantised weights are held to 2^-16 (fp32: 2^-24) of the largest in their row and group. Float weights go to
        torch's own product, except few rows (up to 8) of bf16 on CPU.
        Gradients: to x always, to a float weight and to the bias; a quantised weight is constant.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit, activation_bits not None or 8.
    """
    if isinstance(weight, Tensor):
        return _dense(x, weight, bias, activation_bits)
    if activation_bits not in (None, 8):
        raise KernelArgumentError(f"linear: activation_bits is {activation_bits}; supported are 8 and None")
    _check(x, weight.codes, weight.outputs, weight.columns, bias)
    if not x.is_contiguous():
        x = x.contiguous()
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        y: Tensor = _QUANTISED(
            x, weight.codes, weight.scale, weight.centre, bias, weight.bits, weight.group_size, weight.outputs,
            activation_bits or 0,
        )  # fmt: skip
        return y
    return _run(x, weight, bias, activation_bits)


def bind_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, y: Tensor, bias: Tensor | None = None, *,
    activation_bits: int | None = None,
) -> Callable[[], None]:  # fmt: skip
    """`linear` over fixed buffers, for loops such as decoding: checked and prepared once, a call only runs the kernel.

    Args:
        x, weight, bias, activation_bits: as for `linear`; x is contiguous, and kept alive with the others.
        y: contiguous, of the shape and dtype that `linear` would return; every call fills it from what x holds then.

    Returns:
        The call; without gradients, and not for two threads at a time. On CPU with numba and up to 8 rows it costs
        about a microsecond beside the kernel; elsewhere it is `y.copy_(linear(...))`.

    Raises:
        KernelArgumentError: as `linear`, or buffers that are not contiguous or do not fit.
    """
    with torch.no_grad():
        expected = linear(x, weight, bias, activation_bits=activation_bits)
    for name, buffer, shape in (("x", x, x.shape), ("y", y, expected.shape)):
        if not buffer.is_contiguous() or buffer.shape != shape or buffer.dtype != x.dtype or buffer.device != x.device:
            raise KernelArgumentError(
                f"bind_linear: {name} is {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}; "
                f"expected a contiguous {x.dtype} {tuple(shape)} on {x.device}"
            )
    shift = None if bias is None else bias.detach().contiguous()
    call = None
    if x.device.type == "cpu" and backend_for(x) == "cpu":
        call = cpu.bound(x, weight, shift, y, activation_bits)
    if call is not None:
        return call

    def run() -> None:
        with torch.no_grad():
            y.copy_(linear(x, weight, shift, activation_bits=activation_bits))

    return run


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """A float weight: our kernel for few rows of bf16 on CPU, torch's product for all else."""
    if activation_bits is not None:
        raise KernelArgumentError("linear: activation_bits is for quantised weights; this weight is a tensor")
    if weight.dim() != 2:
        raise KernelArgumentError(f"linear: weight has shape {tuple(weight.shape)}; expected [outputs, columns]")
    if weight.dtype != x.dtype:
        raise KernelArgumentError(f"linear: weight is of dtype {weight.dtype}, x of {x.dtype}; expected the same")
    _check(x, weight, weight.shape[0], weight.shape[1], bias)
    if x.device.type == "cpu" and cpu.takes_bf16(x, weight, bias) and backend_for(x) == "cpu":
        y: Tensor = _DENSE(x.contiguous(), weight, bias)
        return y
    if x.device.type == "cpu" and cpu.takes_vectors(x, weight, bias) and backend_for(x) == "cpu":
        return cpu.by_vectors(x, weight, bias)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _check(x: Tensor, weight: Tensor, outputs: int, columns: int, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS:
        check_dtype("linear", "x", x)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise KernelArgumentError(
            f"linear: x has shape {tuple(x.shape)}; its last dimension must be {columns}, the weight's columns"
        )
    if weight.device != x.device:
        check_device("linear", x, weight=weight)
    if bias is not None:
        check_dtype("linear", "bias", bias)
        check_device("linear", x, bias=bias)
        if bias.shape != (outputs,):
            raise KernelArgumentError(f"linear: bias has shape {tuple(bias.shape)}; expected ({outputs},)")


def _run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    backend = backend_for(x)
    if bias is not None:
        bias = bias.contiguous()
    if backend == "cpu":
        return cpu.linear(x, weight, bias, activation_bits)
    if backend == "triton":
        from ds_kernels.ops.linear import triton

        return triton.linear(x, weight, bias, activation_bits)
    return reference.linear(x, weight, bias, activation_bits)


def _forward(
    x: Tensor, codes: Tensor, scale: Tensor, centre: Tensor | None, bias: Tensor | None, bits: int, group: int,
    outputs: int, activation_bits: int,
) -> Tensor:  # fmt: skip
    weight = QuantizedWeight(codes, scale, centre, bits, group, outputs, x.shape[-1])
    return _run(x, weight, bias, activation_bits or None)


def _forward_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[6]))


def _backward(
    grad: Tensor, codes: Tensor, scale: Tensor, centre: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    weight = QuantizedWeight(codes, scale, centre, bits, group, grad.shape[-1], columns)
    if backend_for(grad) == "cpu":
        return cpu.linear_backward(grad, weight)
    return reference.linear_backward(grad, weight)


def _backward_fake(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], args[5]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, centre, bias, ctx.bits, ctx.group, _, _ = inputs
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, centre)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, centre = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _BACKWARD(grad.contiguous(), codes, scale, centre, ctx.bits, ctx.group, ctx.columns)
    if ctx.needs_input_grad[4]:
        grad_bias = _sum_rows(grad, ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _sum_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(dtype)


def _dense_fake(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dense_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _dense_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight
    if ctx.needs_input_grad[1]:
        grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_bias = _sum_rows(grad, ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias


_BACKWARD = Op(
    "linear_quantised_backward(Tensor grad, Tensor codes, Tensor scale, Tensor? centre, int bits, int group, "
    "int columns) -> Tensor",
    _backward,
    fake=_backward_fake,
)
_QUANTISED = Op(
    "linear_quantised(Tensor x, Tensor codes, Tensor scale, Tensor? centre, Tensor? bias, int bits, int group, "
    "int outputs, int activation_bits) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
_DENSE = Op(
    "linear_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu.linear_bf16,
    fake=_dense_fake,
    setup_context=_dense_save,
    backward=_dense_gradients,
)
