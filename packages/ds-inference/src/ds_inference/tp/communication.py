"""The four places where a tensor-parallel model communicates, each with its gradient.

A tensor is *replicated* (every rank of the group has the same bits) or *partial* (the ranks' values add up to the
whole). Sums are taken in rank order with fp32 accumulation by `ds_comm`, so that what is replicated stays so to the
bit, in forward and in backward.

    copy_to_ranks     replicated -> read by every rank's part     backward: the parts' gradients are summed
    sum_over_ranks    partial -> replicated                       backward: as it is
    gather_features   the ranks' features -> all, replicated      backward: the own features of the gradient
Source: Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), its f and g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_comm import Communicator

__all__ = ["copy_to_ranks", "gather_features", "sum_over_ranks"]


def copy_to_ranks(value: Tensor, communicator: Communicator, label: str) -> Tensor:
    """`value`, whose gradient will be the sum of what the ranks compute for it."""
    if communicator.size == 1 or not (torch.is_grad_enabled() and value.requires_grad):
        return value
    copied: Tensor = _Copy.apply(value, communicator, f"{label}: gradient")  # type: ignore[no-untyped-call]
    return copied


def sum_over_ranks(value: Tensor, communicator: Communicator, label: str) -> Tensor:
    """The sum of the ranks' `value`, in its memory where that may be overwritten."""
    if communicator.size == 1:
        return value
    if torch.is_grad_enabled() and value.requires_grad:
        total: Tensor = _Sum.apply(value, communicator, label)  # type: ignore[no-untyped-call]
        return total
    value = value.contiguous()
    communicator.all_reduce(value, label=label)
    return value


def gather_features(value: Tensor, sizes: Sequence[int], communicator: Communicator, label: str) -> Tensor:
    """[..., sizes[rank]] on each rank -> [..., sum(sizes)] on all."""
    if communicator.size == 1:
        return value
    if torch.is_grad_enabled() and value.requires_grad:
        whole: Tensor = _Gather.apply(value, tuple(sizes), communicator, label)  # type: ignore[no-untyped-call]
        return whole
    return _gathered(value, sizes, communicator, label)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, communicator: Communicator, label: str) -> Tensor:
        ctx.communicator, ctx.label = communicator, label
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the one that came
        ctx.communicator.all_reduce(total, label=ctx.label)
        return total, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, communicator: Communicator, label: str) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        communicator.all_reduce(total, label=label)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: tuple[int, ...], communicator: Communicator, label: str) -> Tensor:
        ctx.own = (sum(sizes[: communicator.rank]), sizes[communicator.rank])
        return _gathered(value, sizes, communicator, label)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.narrow(-1, *ctx.own), None, None, None


def _gathered(value: Tensor, sizes: Sequence[int], communicator: Communicator, label: str) -> Tensor:
    """All-gather of equal pieces: a rank with fewer features than the most has padding behind them."""
    most, rows = max(sizes), value.shape[:-1].numel()
    if rows == 0:  # a chunk of a prompt that wants no logits
        return value.new_empty(*value.shape[:-1], sum(sizes))
    mine = value.reshape(rows, -1)
    if mine.shape[1] < most:
        padded = mine.new_zeros(rows, most)
        padded[:, : mine.shape[1]] = mine
        mine = padded
    pieces = mine.new_empty(communicator.size, rows, most)
    communicator.all_gather_into(pieces.view(-1), mine.contiguous().view(-1), label=label)
    whole = mine.new_empty(rows, sum(sizes))
    at = 0
    for piece, size in zip(pieces, sizes, strict=True):
        whole[:, at : at + size] = piece[:, :size]
        at += size
    return whole.view(*value.shape[:-1], -1)
