"""grouped_gemm: y[r] = x[r] @ weight[g].T + bias[g] for the rows r of group g (the experts of a mixture).

Rows are sorted by group; `ends[g]` is one past the last row of group g, so group g has rows [ends[g - 1], ends[g]).
This is the convention of `torch.nn.functional.grouped_mm(x, weight.mT, offs=ends)`.

Source: Gale et al. 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (arXiv:2211.15841): groups of
unequal size without padding or dropping.
Limit: compute for many rows, 2 * rows * in * out flops forward and twice that backward; memory for few: every weight
of a group with rows is read once (`out * in * itemsize` bytes). On CPU torch's product per group; groups of up to 4
rows by a numba loop that reads a weight row once for all of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.grouped_gemm import cpu, reference

__all__ = ["grouped_gemm"]


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each contiguous group of rows by the group's own weight.

    Args:
        x: [rows, in], fp32, bf16, fp16 or fp64; any strides.
        weight: [groups, out, in] like `nn.Linear`'s, of x's dtype; any strides (a transposed view is not copied).
        ends: [groups], int32 or int64: one past each group's last row; not decreasing, at most `rows`. Checked on the
            CPU; on a GPU, where looking would wait for it, the caller's responsibility.
        bias: [groups, out] of x's dtype, or None.

    Returns:
        [rows, out] like x; rows at and after ends[-1] are zero (and get gradient zero). Products are summed in fp32
        and rounded once.

    Raises:
        KernelArgumentError: shapes that do not fit, another dtype or device, ends that are not ends.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        check_dtype("grouped_gemm", name, tensor)
    check_device("grouped_gemm", x, weight=weight, ends=ends, bias=bias)
    check_dtype("grouped_gemm", "ends", ends, (torch.int32, torch.int64))
    require(
        x.dim() == 2 and weight.dim() == 3 and weight.shape[2] == x.shape[1],
        f"grouped_gemm: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
        "expected [rows, in] and [groups, out, in]",
    )
    require(
        ends.shape == weight.shape[:1],
        f"grouped_gemm: ends has shape {tuple(ends.shape)}; expected ({weight.shape[0]},), one per group of weight",
    )
    require(
        bias is None or bias.shape == weight.shape[:2],
        f"grouped_gemm: bias has shape {None if bias is None else tuple(bias.shape)}; "
        f"expected {tuple(weight.shape[:2])}",
    )
    for name, tensor_ in (("weight", weight), ("bias", bias)):
        require(
            tensor_ is None or tensor_.dtype == x.dtype,
            f"grouped_gemm: {name} is of dtype {None if tensor_ is None else tensor_.dtype}; expected x's, {x.dtype}",
        )
    y: Tensor = _FORWARD(x.contiguous(), weight, ends, bias)
    return y


def _check_ends(ends: Tensor, rows: int) -> None:
    values = [0, *ends.tolist()]
    require(
        all(a <= b for a, b in itertools.pairwise(values)) and values[-1] <= rows,
        f"grouped_gemm: ends is {values[1:]}; expected numbers that do not decrease, from 0 to at most {rows} rows",
    )


def _forward(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    backend = backend_for(x)
    if x.device.type == "cpu":
        _check_ends(ends, x.shape[0])
    if backend == "triton":
        from ds_kernels.ops.grouped_gemm import triton

        return triton.grouped_gemm(x, weight, ends, bias)
    if backend == "cpu":
        return cpu.grouped_gemm(x, weight, ends, bias)
    return reference.grouped_gemm(x, weight, ends, bias)


def _forward_fake(x: Tensor, weight: Tensor, _ends: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, has_bias: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "triton":
        from ds_kernels.ops.grouped_gemm import triton

        return triton.grouped_gemm_backward(grad, x, weight, ends, has_bias, need_x, need_weight)
    if backend == "cpu":
        return cpu.grouped_gemm_backward(grad, x, weight, ends, has_bias, need_x, need_weight)
    return reference.grouped_gemm_backward(grad, x, weight, ends, has_bias, need_x, need_weight)


def _backward_fake(
    _grad: Tensor, x: Tensor, weight: Tensor, _ends: Tensor, has_bias: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:2] if has_bias else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ends, bias = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _BACKWARD(
        grad.contiguous(), x, weight, ends, ctx.has_bias and need_bias, need_x, need_weight
    )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        None,
        grad_bias if ctx.has_bias and need_bias else None,
    )


_BACKWARD = Op(
    "grouped_gemm_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends, bool has_bias, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "grouped_gemm(Tensor x, Tensor weight, Tensor ends, Tensor? bias) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
