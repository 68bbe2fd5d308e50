"""The gradients of weights that several virtual stages use (`TiedLayerSpec`), summed once per micro-batch.

Vocabulary. A *use* is one of the tie's virtual stages; the *owner* is the rank of its first use. Backward reaches the
uses from the last to the first; every other use's gradient is at the owner (sent, or held if made there) before the
first use's backward is over. There they are added from the last use to the first, as autograd does in the unsplit
model, and the sum is accumulated as the micro-batch's one gradient. After the last micro-batch the owner's total
replaces what the other holders have.

Two ways to get at a use's gradient. A whole backward accumulates by itself, so a tensor hook on the parameter sends it,
or, at the owner, replaces it by the sum; both happen before AccumulateGrad, so that post-accumulate hooks see the sum.
Where the chunk's gradients are found first and delivered later (`_split`), they are taken and put back there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ds_pipe._channels import TIE, TOTAL, Channels
from ds_pipe._split import Record, deliver
from ds_pipe.errors import PipelineError
from ds_pipe.module import Tie
from ds_pipe.schedule.action import Schedule
from ds_pipe.sync import GradientSync

__all__ = ["Ties"]


class Ties:
    """The tied weights of rank `stage` of the pipeline."""

    def __init__(self, ties: Sequence[Tie], schedule: Schedule, stage: int, channels: Channels) -> None:
        self._ties = ties
        self._placement = schedule.placement
        _check_order(schedule)
        self._stage = stage
        self._channels = channels
        self._held: dict[tuple[int, int], deque[Tensor]] = {}  # by tie and use: gradients made here, at the owner

    def used_by(self, virtual: int) -> list[Tie]:
        return [tie for tie in self._ties if virtual in tie.virtuals and tie.parameter.requires_grad]

    def begin(self) -> None:
        self._held.clear()

    @contextmanager
    def in_backward(self, virtual: int, sync: GradientSync) -> Iterator[None]:
        """Around a whole backward of virtual stage `virtual`."""
        missing = self.used_by(virtual)
        hooks = [tie.parameter.register_hook(partial(self._on_gradient, missing, tie, virtual)) for tie in missing]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for tie in list(missing):  # not used in this micro-batch, but others may have
            total = self._contribute(tie, virtual, _zeros(tie.parameter, sync))
            if total is not None:
                with sync.whole([tie.parameter]):
                    deliver([], {tie.parameter: total})

    def _on_gradient(self, missing: list[Tie], tie: Tie, virtual: int, gradient: Tensor) -> Tensor | None:
        missing.remove(tie)
        return self._contribute(tie, virtual, gradient.detach())

    def exchange(self, virtual: int, record: Record, sync: GradientSync) -> None:
        """After I of virtual stage `virtual`: its tied gradients leave `record`, the owner's sums come in."""
        for tie in self.used_by(virtual):
            own = record.rest.pop(tie.parameter, None)
            total = self._contribute(tie, virtual, _zeros(tie.parameter, sync) if own is None else own)
            if total is not None:
                record.rest[tie.parameter] = total

    def finish(self, sync: GradientSync) -> None:
        """After the last micro-batch: every holder takes over the owner's total."""
        for tie in self._ties:
            if not tie.parameter.requires_grad:
                continue
            owner, *others = tie.stages
            if self._stage == owner and others:
                total = sync.tied_sum(tie.parameter)
                for stage in others:
                    self._channels.send(TOTAL, tie.number, stage, total)
            elif others:
                sync.set_tied_sum(tie.parameter, self._channels.receive(TOTAL, tie.number, owner))

    def _contribute(self, tie: Tie, virtual: int, own: Tensor) -> Tensor | None:
        """One use's gradient for the next micro-batch; the sum of all uses where it is the owner's first."""
        owner = tie.stages[0]
        if self._stage != owner:
            self._channels.send(TIE, self._channel(tie, virtual), owner, own)
            return None
        self._held.setdefault((tie.number, virtual), deque()).append(own)
        if virtual != tie.virtuals[0]:
            return None
        total: Tensor | None = None
        for use in reversed(tie.virtuals):
            stage = self._placement[use]
            if stage == owner:
                part = self._held[tie.number, use].popleft()
            else:
                part = self._channels.receive(TIE, self._channel(tie, use), stage)
            total = part if total is None else total + part
        return total

    def _channel(self, tie: Tie, virtual: int) -> int:
        return tie.number * len(self._placement) + virtual


def _check_order(schedule: Schedule) -> None:
    """Uses meet by their order, so every chunk's backwards must come in ascending order of micro-batches."""
    for actions in schedule.actions:
        following = [0] * schedule.num_chunks
        for action in actions:
            if action.kind in "BI":
                if action.micro_batch != following[action.chunk]:
                    raise PipelineError(
                        f"schedule {schedule.name!r}: {action} comes where micro-batch {following[action.chunk]} is "
                        "next; with tied weights the input gradients of a chunk come in ascending order"
                    )
                following[action.chunk] += 1


def _zeros(parameter: nn.Parameter, sync: GradientSync) -> Tensor:
    """The gradient of a use that a micro-batch left out."""
    with sync.whole([parameter]):
        return torch.zeros_like(parameter)
