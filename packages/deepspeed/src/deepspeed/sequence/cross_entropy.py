"""The loss of a sequence that ranks share, for every token of it on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import ds_comm
from deepspeed._lazy import explain_absent
from deepspeed.sequence.exchange import gather_lengths, swap

__all__ = ["vocab_sequence_parallel_cross_entropy"]


class _GatherLosses(torch.autograd.Function):
    """Every rank's rows on every rank; in backward the ranks' gradients of this rank's rows are added."""

    @staticmethod
    def forward(ctx: Any, group: Any, local: Tensor) -> Tensor:
        ctx.group = group
        ctx.lengths = gather_lengths(group, local.shape[0], local.device, "sequence loss lengths")
        shapes = [[(length, *local.shape[1:])] for length in ctx.lengths]
        found = swap(group, [[local]] * len(ctx.lengths), shapes, "sequence loss")
        return torch.cat([parts[0] for parts in found])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        rows = ctx.lengths[ds_comm.get_rank(ctx.group)]
        shape = (rows, *gradient.shape[1:])
        parts = [[part] for part in gradient.split(ctx.lengths)]
        found = swap(ctx.group, parts, [[shape]] * len(parts), "sequence loss, backward")
        total = found[0][0].clone()
        for part in found[1:]:
            total += part[0]
        return None, total


def _gathered(group: Any, local: Tensor) -> Tensor:
    result: Tensor = _GatherLosses.apply(group, local)  # type: ignore[no-untyped-call]
    return result


def vocab_sequence_parallel_cross_entropy(
    vocab_seq_parallel_logits: Tensor,
    target: Tensor,
    sp_group: Any,
    ignore_index: int = -100,
    reduction: str = "none",
    gather_sequence_loss: bool = True,
) -> Tensor:
    """Cross entropy of logits whose sequence is split over ranks and whose vocabulary is whole; collective.

    Args:
        vocab_seq_parallel_logits: [this rank's tokens, batch, vocabulary], any floating dtype; computed in fp32.
        target: [this rank's tokens, batch]; `ignore_index` counts for nothing.
        reduction: "none": a loss for each token; "sum" or "mean" over the whole sequence's tokens that count.
        gather_sequence_loss: with "none", whether the losses of all ranks come back, or this rank's.
    Returns:
        [tokens of all ranks, batch], [this rank's tokens, batch], or a scalar that is the same on every rank, in fp32.

    The gradient is that of the sum of the ranks' losses: when each rank takes the same mean of what comes back, its
    logits get as many times the gradient of one process as ranks share the sequence, which the engine's mean over all
    ranks divides by again.
    """
    if target.shape != vocab_seq_parallel_logits.shape[:-1]:
        raise ValueError(
            f"logits {tuple(vocab_seq_parallel_logits.shape)} and target {tuple(target.shape)}: expected the same"
            " shape, but for the vocabulary at the end of the logits"
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; expected none, sum or mean")
    flat = vocab_seq_parallel_logits.reshape(-1, vocab_seq_parallel_logits.shape[-1]).float()
    losses = torch.nn.functional.cross_entropy(flat, target.reshape(-1), ignore_index=ignore_index, reduction="none")
    losses = losses.view(target.shape)
    if reduction == "none":
        return _gathered(sp_group, losses) if gather_sequence_loss else losses
    total = _gathered(sp_group, losses.sum().view(1)).sum()
    if reduction == "sum":
        return total
    count = (target != ignore_index).sum().float()
    ds_comm.all_reduce(count, group=sp_group, label="sequence loss tokens")
    return total / count.clamp(min=1)


explain_absent(__name__)
