"""softmax: scaled, masked, causal softmax of attention scores in one pass.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv:1805.02867) for rows that do
not fit a block; otherwise the row is held.
Limit: memory. Forward reads x and writes y, backward reads grad and y and writes grad_x: 2 and 3 passes of
`numel * itemsize` bytes, and the mask once as it is (broadcast, not expanded). Causal rows read half of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, check_device, check_dtype, require
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op

__all__ = ["softmax"]


def softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """Softmax over the last dimension of scale * x + mask.

    Args:
        x: [..., rows, cols] (1 dimension or more; causal needs 2), fp32, bf16, fp16 or fp64; any strides.
        mask: broadcastable to x; boolean (True: look there) or float (added after scaling). A constant: no gradient.
        scale: factor of x.
        causal: row i sees columns up to i + cols - rows: the last row sees all.

    Returns:
        Tensor like x, contiguous; rows with nothing to see (all -inf) are zeros. In fp32 (fp64 for fp64), rounded
        once. Backward works from the rounded result, as torch's does.

    Raises:
        KernelArgumentError: a mask that does not broadcast, requires grad, or is of another dtype or device.
    """
    require(x.dim() >= (2 if causal else 1), f"softmax: x has shape {tuple(x.shape)}; expected [..., rows, cols]")
    check_dtype("softmax", "x", x)
    if mask is not None:
        check_device("softmax", x, mask=mask)
        check_dtype("softmax", "mask", mask, (torch.bool, *FLOATS))
        require(not mask.requires_grad, "softmax: mask is a constant and gets no gradient; detach it first")
        require(
            _broadcasts(mask, x),
            f"softmax: mask has shape {tuple(mask.shape)}; expected one that broadcasts to x, {tuple(x.shape)}",
        )
    y: Tensor = _FORWARD(x.contiguous(), mask, scale, causal)
    return y


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    trailing = x.shape[x.dim() - mask.dim() :] if 0 < mask.dim() <= x.dim() else ()
    return len(trailing) == mask.dim() and all(
        mine in (1, theirs) for mine, theirs in zip(mask.shape, trailing, strict=True)
    )


def _forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    y: Tensor = implementation("softmax", x).softmax(x, mask, scale, causal)
    return y


def _fake(x: Tensor, _mask: Tensor | None, _scale: float, _causal: bool) -> Tensor:
    return torch.empty_like(x)


def _backward(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    grad_x: Tensor = implementation("softmax", y).softmax_backward(grad, y, scale, causal)
    return grad_x


def _backward_fake(_grad: Tensor, y: Tensor, _scale: float, _causal: bool) -> Tensor:
    return torch.empty_like(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return _BACKWARD(grad.contiguous(), y, ctx.scale, ctx.causal), None, None, None


_BACKWARD = Op(
    "softmax_backward(Tensor grad, Tensor y, float scale, bool causal) -> Tensor", _backward, fake=_backward_fake
)
_FORWARD = Op(
    "softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    _forward,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
)
