"""Argument checks shared by the operations: each names the operation, the argument, the value and what is supported."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels.errors import KernelArgumentError

__all__ = ["FLOATS", "check_device", "check_dtype", "check_last_dim", "check_like", "require"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise `KernelArgumentError(message)` unless the condition holds."""
    if not condition:
        raise KernelArgumentError(message)


def check_dtype(op: str, name: str, tensor: Tensor, supported: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A tensor's dtype is one of those supported."""
    if tensor.dtype not in supported:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        raise KernelArgumentError(f"{op}: {name} is of dtype {tensor.dtype}; supported are {names}")


def check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors are on one device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise KernelArgumentError(
                f"{op}: {name} is on {tensor.device}, the first argument on {first.device}; all must be on one device"
            )


def check_last_dim(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Every given vector is 1-D of the size of x's last dimension."""
    if x.dim() == 0:
        raise KernelArgumentError(f"{op}: x is a scalar; expected at least one dimension to work along")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise KernelArgumentError(
                f"{op}: {name} has shape {tuple(vector.shape)}; expected ({x.shape[-1]},), the last dimension of x"
            )


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor has the shape and the dtype of another."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        raise KernelArgumentError(
            f"{op}: {name} is {tuple(tensor.shape)} of {tensor.dtype}; expected {tuple(other.shape)} of {other.dtype}, "
            f"as {other_name}"
        )
