"""Where a stage's gradients go: the protocol between the executor and whoever keeps and reduces them.

The executor runs backward passes and sums tied weights over the stages; a `GradientSync` says how gradients are kept
and reduced over the replicas of the pipeline. `PlainSync`, the default, is `.grad` of this rank alone; deepspeed's
engine brings one over ZeRO. Per train_batch the executor calls, in this order:

    begin_batch(num_micro_batches)
    per micro-batch: scaled(loss) on the rank of the last virtual stage; the backwards, each chunk's
        ended by end_chunk(chunk, micro_batch); end_micro_batch(micro_batch)
    tied_sum(parameter) on the owner of a tied weight, set_tied_sum(parameter, total) on its other holders

Invariants. Gradients reach a trainable parameter through its AccumulateGrad node, once per micro-batch in which it was
used, in ascending order of micro-batches (so tensor hooks and post-accumulate hooks see what they see without a
pipeline); with several chunks per rank, different parameters may be at different micro-batches. `end_micro_batch(i)`
comes when all chunks of this rank have delivered micro-batch i, for i = 0, 1, 2, ... Where backward is split (or a
tied weight is in two chunks of a rank), gradients are computed first and delivered later, outside of any backward pass
through the layers and inside `whole(parameters)`. A tied weight's gradients, summed over all its uses, arrive at its
owner; what arrives at its other holders before `set_tied_sum` means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["GradientSync", "PlainSync"]


@runtime_checkable
class GradientSync(Protocol):
    """How a stage's gradients are kept and reduced."""

    def begin_batch(self, num_micro_batches: int) -> None:
        """Before the first action of a train_batch."""

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward starts from, given a micro-batch's mean loss (a scalar that requires a gradient)."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Entered to deliver gradients outside of a backward pass: inside, `parameters` have their full shapes."""

    def end_chunk(self, chunk: int, micro_batch: int) -> None:
        """All gradients of one chunk for `micro_batch` are accumulated; ascending in each chunk, on replicas alike."""

    def end_micro_batch(self, micro_batch: int) -> None:
        """All gradients of this rank for `micro_batch` are accumulated; called in ascending order."""

    def tied_sum(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient of a tied weight at its owner, in full shape, after the last micro-batch."""

    def set_tied_sum(self, parameter: nn.Parameter, total: Tensor) -> None:
        """Take over the owner's sum (the shape of `parameter`) as this parameter's accumulated gradient."""


class PlainSync:
    """Gradients stay in `.grad`; each micro-batch's loss is divided by their number."""

    def __init__(self) -> None:
        self._num_micro_batches = 1

    def begin_batch(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches

    def scaled(self, loss: Tensor) -> Tensor:
        return loss / self._num_micro_batches

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        return nullcontext()

    def end_chunk(self, chunk: int, micro_batch: int) -> None:
        pass

    def end_micro_batch(self, micro_batch: int) -> None:
        pass

    def tied_sum(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def set_tied_sum(self, parameter: nn.Parameter, total: Tensor) -> None:
        parameter.grad = total
