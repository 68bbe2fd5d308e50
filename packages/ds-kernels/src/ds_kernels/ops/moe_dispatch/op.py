"""moe_dispatch and moe_combine: tokens to the rows of their experts (`moe_gate` says which) and back.

    rows = moe_dispatch(x, routing)            rows[r]  = x[token of r]
    y = expert(rows)                           e.g. two grouped_gemm(rows, weight, routing.ends)
    out = moe_combine(y, routing)              out[t]   = sum over j of weights[t, j] * y[slot of (t, j)]

Source: Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), whose one-hot products [tokens, experts, capacity] become
gathers here, as in Gale et al. 2022, "MegaBlocks" (arXiv:2211.15841).
Limit: memory: each reads or writes `tokens * k * hidden` elements on the side of the rows and `tokens * hidden` on the
other; combine's backward reads the rows once more for the gradient of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.moe_dispatch import cpu, reference
from ds_kernels.ops.moe_gating import Routing

__all__ = ["moe_combine", "moe_dispatch"]


def moe_dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copy each token to the rows of the experts it was routed to.

    Args:
        x: [tokens, hidden], fp32, bf16, fp16 or fp64; any strides.
        routing: what `moe_gate` returned for these tokens.

    Returns:
        [routing.num_rows, hidden] like x, sorted by expert; rows of no token are zero. The gradient of a token is the
        sum of its rows' gradients in fp32, rounded once.

    Raises:
        KernelArgumentError: another number of tokens, another device, a dtype that is not a float.
    """
    check_dtype("moe_dispatch", "x", x)
    check_device("moe_dispatch", x, routing=routing.slots)
    require(
        x.dim() == 2 and x.shape[0] == routing.slots.shape[0],
        f"moe_dispatch: x has shape {tuple(x.shape)}; expected ({routing.slots.shape[0]}, hidden), one token each",
    )
    rows: Tensor = _DISPATCH(x.contiguous(), routing.sources, routing.slots)
    return rows


def moe_combine(y: Tensor, routing: Routing) -> Tensor:
    """Sum, for each token, its experts' rows by the weights of the routing.

    Args:
        y: [routing.num_rows, hidden], the experts' outputs in the order of `moe_dispatch`; any strides.
        routing: the same routing; its weights get their gradients.

    Returns:
        [tokens, hidden] like y: summed in fp32 in the order of the choices, rounded once. Tokens that were dropped
        by all their experts are zero.

    Raises:
        KernelArgumentError: another number of rows, another device, a dtype that is not a float.
    """
    check_dtype("moe_combine", "y", y)
    check_device("moe_combine", y, routing=routing.slots)
    require(
        y.dim() == 2 and y.shape[0] == routing.num_rows,
        f"moe_combine: y has shape {tuple(y.shape)}; expected ({routing.num_rows}, hidden), the routing's rows",
    )
    weights = routing.weights.to(torch.promote_types(y.dtype, torch.float32))
    out: Tensor = _COMBINE(y.contiguous(), weights, routing.slots, routing.sources)
    return out


def _implementation(x: Tensor) -> Any:
    backend = backend_for(x)
    if backend == "triton":
        from ds_kernels.ops.moe_dispatch import triton

        return triton
    return cpu if backend == "cpu" else reference


def _dispatch(x: Tensor, sources: Tensor, slots: Tensor) -> Tensor:
    rows: Tensor = _implementation(x).rows_of_tokens(x, sources, None, slots.shape[1])
    return rows


def _dispatch_fake(x: Tensor, sources: Tensor, _slots: Tensor) -> Tensor:
    return x.new_empty(sources.shape[0], x.shape[1])


def _combine(y: Tensor, weights: Tensor | None, slots: Tensor, _sources: Tensor) -> Tensor:
    tokens: Tensor = _implementation(y).tokens_of_rows(y, slots, weights)
    return tokens


def _combine_fake(y: Tensor, _weights: Tensor | None, slots: Tensor, _sources: Tensor) -> Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


def _combine_backward(
    grad: Tensor, y: Tensor, weights: Tensor, slots: Tensor, sources: Tensor
) -> tuple[Tensor, Tensor]:
    implementation = _implementation(grad)
    grad_y = implementation.rows_of_tokens(grad, sources, weights, slots.shape[1])
    return grad_y, implementation.weight_gradient(grad, y, slots)


def _combine_backward_fake(
    _grad: Tensor, y: Tensor, weights: Tensor, _slots: Tensor, _sources: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(weights, memory_format=torch.contiguous_format)


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _dispatch_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sources, slots = ctx.saved_tensors
    return _SUM(grad.contiguous(), None, slots, sources), None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, grad_weights = _COMBINE_BACKWARD(grad.contiguous(), *ctx.saved_tensors)
    return grad_y, grad_weights, None, None


_SUM = Op("moe_sum(Tensor y, Tensor? weights, Tensor slots, Tensor sources) -> Tensor", _combine, fake=_combine_fake)
_DISPATCH = Op(
    "moe_dispatch(Tensor x, Tensor sources, Tensor slots) -> Tensor",
    _dispatch,
    fake=_dispatch_fake,
    setup_context=_save_dispatch,
    backward=_dispatch_gradients,
)
_COMBINE_BACKWARD = Op(
    "moe_combine_backward(Tensor grad, Tensor y, Tensor weights, Tensor slots, Tensor sources) -> (Tensor, Tensor)",
    _combine_backward,
    fake=_combine_backward_fake,
)
_COMBINE = Op(
    "moe_combine(Tensor y, Tensor weights, Tensor slots, Tensor sources) -> Tensor",
    _combine,
    fake=_combine_fake,
    setup_context=_save_combine,
    backward=_combine_gradients,
)
