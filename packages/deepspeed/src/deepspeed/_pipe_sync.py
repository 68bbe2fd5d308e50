"""What joins the pipeline's executor and ZeRO: a `ds_pipe.GradientSync` over a `ZeroOptimizer`.

A stage's gradients are reduced over its replicas when a micro-batch's backward ends, exactly as without a pipeline:
that is why pipeline x data gives the bits of data alone. The mean over micro-batches is taken at the boundary, so the
loss is multiplied by the loss scale only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

import ds_zero

__all__ = ["ZeroSync"]


class ZeroSync:
    """The gradients of one stage of `num_chunks` chunks, kept by `optimizer` at any ZeRO stage."""

    def __init__(self, optimizer: ds_zero.ZeroOptimizer, num_chunks: int) -> None:
        self._optimizer = optimizer
        self._has_lanes = num_chunks > 1

    def begin_batch(self, num_micro_batches: int) -> None:
        self._optimizer.reducer.announce(num_micro_batches)

    def scaled(self, loss: Tensor) -> Tensor:
        return self._optimizer.scale(loss)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        return ds_zero.gathered_units(parameters)

    def end_chunk(self, chunk: int, micro_batch: int) -> None:
        if self._has_lanes:
            self._optimizer.reducer.end_lane(chunk)

    def end_micro_batch(self, micro_batch: int) -> None:
        self._optimizer.end_backward(force=True)

    def tied_sum(self, parameter: nn.Parameter) -> Tensor:
        return ds_zero.accumulated_gradient(parameter)

    def set_tied_sum(self, parameter: nn.Parameter, total: Tensor) -> None:
        ds_zero.set_accumulated_gradient(parameter, total)
