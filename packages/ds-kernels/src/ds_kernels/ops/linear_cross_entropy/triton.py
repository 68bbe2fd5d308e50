"""linear_cross_entropy on GPUs: cuBLAS for the products, the Triton kernels of cross_entropy on chunks of rows.

A chunk's logits are overwritten with their gradient. Chunks are sized so that their logits take about as much memory
as x (Liger Kernel's rule): more rows make the products no faster, fewer do not fill the GPU.
"""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.cross_entropy import triton as dense
from ds_kernels.ops.linear_cross_entropy import reference
from ds_kernels.ops.linear_cross_entropy.cpu import Terms

__all__ = ["builds", "linear_cross_entropy", "linear_cross_entropy_backward", "loss_and_gradients"]


def _chunk_rows(rows: int, dim: int, vocabulary: int) -> int:
    return min(rows, max(256, next_power_of_2(-(-rows * dim // vocabulary)))) or 1


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    options = (terms.ignore_index, terms.smoothing, terms.z_loss)
    if x.dtype == torch.float64 or not x.shape[0]:
        return reference.linear_cross_entropy(x, weight, bias, target, *options)
    chunk = _chunk_rows(x.shape[0], x.shape[1], weight.shape[0])
    parts = [
        dense.cross_entropy(_logits(part, weight, bias), part_target, *options)
        for part, part_target in zip(x.split(chunk), target.split(chunk), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]), torch.cat([lse for _, lse in parts])


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64."""
    options = (terms.ignore_index, terms.smoothing, terms.z_loss)
    if x.dtype == torch.float64 or not x.shape[0]:
        return reference.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, *options)
    sums = _Sums(x, weight, bias, (True, True, bias is not None))
    chunk = _chunk_rows(x.shape[0], x.shape[1], weight.shape[0])
    for low in range(0, x.shape[0], chunk):
        part = slice(low, low + chunk)
        logits = _logits(x[part], weight, bias)
        dense.gradient(grad[part], logits, logits, target[part], lse[part], *options)
        sums.add(part, logits)
    return sums.results()


def loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms, need: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the lse [rows], the sum's gradients of x, weight and bias (empty if not needed)."""
    options = (terms.ignore_index, terms.smoothing, terms.z_loss)
    ones = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    losses, lses = torch.zeros_like(ones), torch.zeros_like(ones)
    sums = _Sums(x, weight, bias, need)
    chunk = _chunk_rows(x.shape[0], x.shape[1], weight.shape[0])
    for low in range(0, x.shape[0], chunk):
        part = slice(low, low + chunk)
        logits = _logits(x[part], weight, bias)
        losses[part], lses[part] = dense.cross_entropy(logits, target[part], *options)
        dense.gradient(ones[part], logits, logits, target[part], lses[part], *options)
        sums.add(part, logits)
    return (losses.sum(), lses, *sums.results())


class _Sums:
    """The gradients, as chunks of the logits' gradient come in; sums over chunks are in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, need: tuple[bool, ...]) -> None:
        self._inputs = x, weight, bias
        self._x = torch.empty_like(x) if need[0] else None
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if need[1] else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if need[2] and bias is not None else None

    def add(self, part: slice, grad_logits: Tensor) -> None:
        """Take in the gradient [rows of the part, vocabulary] of the logits."""
        x, weight, _ = self._inputs
        if self._x is not None:
            torch.mm(grad_logits, weight, out=self._x[part])
        if self._weight is not None:
            self._weight += grad_logits.t() @ x[part]
        if self._bias is not None:
            self._bias += grad_logits.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; empty where not needed."""
        x = self._inputs[0]
        return tuple(  # type: ignore[return-value]
            x.new_empty(0) if total is None else total.to(x.dtype) for total in (self._x, self._weight, self._bias)
        )


def builds() -> Iterator[Build]:
    """None of its own: its kernels are those of cross_entropy."""
    return iter(())
