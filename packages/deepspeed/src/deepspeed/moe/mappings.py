"""Tokens over tensor-parallel ranks: each keeps its part (`drop_tokens`), or has all of them again (`gather_tokens`).

One is the other's gradient. Without tensor-parallel ranks (`utils.groups.mpu`) both give their input back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ds_comm
from deepspeed.utils import groups

__all__ = ["drop_tokens", "gather_tokens"]


def _gather_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    group = groups._get_model_parallel_group()
    parts = [torch.empty_like(input_) for _ in range(ds_comm.get_world_size(group))]
    ds_comm.all_gather(parts, input_.contiguous(), group=group, label="tokens")
    return torch.cat(parts, dim=dim)


def _drop_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    size, rank = groups._get_model_parallel_world_size(), groups._get_model_parallel_rank()
    if input_.shape[dim] % size:
        raise ValueError(
            f"drop_tokens: dimension {dim} has {input_.shape[dim]} tokens, which {size} tensor-parallel ranks cannot"
            " share equally; pad it"
        )
    return input_.chunk(size, dim=dim)[rank].contiguous()


class _GatherTokens(torch.autograd.Function):
    """All ranks' tokens; of the gradient, the own part."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _gather_tokens(input_, dim)

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, None]:
        return _drop_tokens(grad_output[0], ctx.dim), None


class _DropTokens(torch.autograd.Function):
    """The own part of the tokens; of the gradient, all ranks' parts."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _drop_tokens(input_, dim)

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens(grad_output[0], ctx.dim), None


def gather_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    """The tokens of all tensor-parallel ranks, concatenated along `dim`; collective over them."""
    if groups._get_model_parallel_world_size() == 1:
        return input_
    gathered: Tensor = _GatherTokens.apply(input_, dim)  # type: ignore[no-untyped-call]
    return gathered


def drop_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    """This tensor-parallel rank's part of the tokens along `dim`; the backward is collective.

    Raises:
        ValueError: the ranks do not divide the tokens.
    """
    if groups._get_model_parallel_world_size() == 1:
        return input_
    dropped: Tensor = _DropTokens.apply(input_, dim)  # type: ignore[no-untyped-call]
    return dropped
