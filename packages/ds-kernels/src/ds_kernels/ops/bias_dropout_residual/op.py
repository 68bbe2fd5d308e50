"""bias_dropout_residual: out = residual + dropout(x + bias), the end of each half of a transformer layer.

Source: Srivastava et al. 2014, "Dropout" (JMLR 15); the mask is not kept but hashed again in backward, from a counter
as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The hash is described in `reference.py`.
Limit: memory. Forward reads x and residual and writes out, backward reads grad and writes grad_x: 3 and 2 passes of
`rows * dim * itemsize` bytes; the gradient of the residual is grad itself. Only the seed (8 bytes) is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, check_last_dim, check_like, require
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op

__all__ = ["bias_dropout_residual"]


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """residual + dropout(x + bias), with the same mask for the same seed and shape on every backend.

    Args:
        x: [..., dim], fp32, bf16, fp16 or fp64; any strides; fewer than 2^32 rows.
        bias: [dim], any float dtype, or None for zeros.
        residual: like x, or None for zeros.
        p: probability in [0, 1] of an element of x + bias to become 0; the others are divided by 1 - p.
        training: False switches dropout off, as p = 0 does.
        seed: 64 bits of randomness, as an int or an int64 tensor of one element on x's device (which is not read by the
            host). None takes it from torch's generator of that device: `torch.manual_seed` and checkpointing apply.

    Returns:
        Tensor like x, contiguous. Computed in fp32 (fp64 for fp64), rounded once.

    Raises:
        KernelArgumentError: p outside [0, 1], a seed of another form, tensors of other shapes, dtypes or devices.
    """
    check_last_dim("bias_dropout_residual", x, bias=bias)
    check_dtype("bias_dropout_residual", "x", x)
    if bias is not None:
        check_dtype("bias_dropout_residual", "bias", bias)
    check_device("bias_dropout_residual", x, bias=bias, residual=residual)
    if residual is not None:
        check_like("bias_dropout_residual", "residual", residual, "x", x)
    require(0.0 <= p <= 1.0, f"bias_dropout_residual: p is {p}; expected a probability in [0, 1]")
    p = float(p) if training else 0.0
    bias = None if bias is None else bias.contiguous()
    rest = None if residual is None else residual.contiguous()
    out: Tensor = _FORWARD(x.contiguous(), bias, rest, _seed(x, seed, p), p)
    return out


def _seed(x: Tensor, seed: int | Tensor | None, p: float) -> Tensor:
    """The seed as a tensor; nothing is drawn where it would not be used."""
    if isinstance(seed, Tensor):
        require(
            seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == x.device,
            f"bias_dropout_residual: seed is {tuple(seed.shape)} of {seed.dtype} on {seed.device}; expected one int64 "
            f"on {x.device}",
        )
        return seed.reshape(1)
    if seed is not None or p == 0:
        number = (seed or 0) & (2**64 - 1)
        return torch.full((1,), number - 2**64 if number >= 2**63 else number, dtype=torch.int64, device=x.device)
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _forward(x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    out: Tensor = implementation("bias_dropout_residual", x).bias_dropout_residual(x, bias, residual, seed, p)
    return out


def _forward_fake(x: Tensor, _bias: Tensor | None, _residual: Tensor | None, _seed: Tensor, _p: float) -> Tensor:
    return torch.empty_like(x)


def _backward(grad: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor]
    gradients = implementation("bias_dropout_residual", grad).bias_dropout_residual_backward(grad, seed, p)
    return gradients


def _backward_fake(grad: Tensor, _seed: Tensor, _p: float) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.empty_like(grad), grad.new_empty(grad.shape[-1], dtype=exact)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, bias, residual, seed, ctx.p = inputs
    ctx.bias_dtype, ctx.has_residual = None if bias is None else bias.dtype, residual is not None
    ctx.save_for_backward(seed)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    grad_x, grad_bias = _BACKWARD(grad.contiguous(), seed, ctx.p)
    of_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, of_bias, grad if ctx.has_residual else None, None, None


_BACKWARD = Op(
    "bias_dropout_residual_backward(Tensor grad, Tensor seed, float p) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    "bias_dropout_residual(Tensor x, Tensor? bias, Tensor? residual, Tensor seed, float p) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
