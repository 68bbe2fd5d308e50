"""Upstream's schedule classes and instructions (`deepspeed.runtime.pipe.schedule`), for code that subclasses or reads
them. The lists are theirs, instruction by instruction; ds-pipe's own schedules are in `ds_pipe.schedule`.

A schedule here is made for one stage and yields, per step, a list of instructions. Buffers hold one micro-batch each
and are used in turn: micro-batch i has buffer i mod num_pipe_buffers. In `TrainSchedule` (1F1B over 2(m + p - 1) steps)
a stage does a forward when step and stage have the same parity, else a backward; micro-batches outside [0, m) are
bubbles. Instructions carry their keyword arguments as attributes and have no equality of their own: executors dispatch
on the exact type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

__all__ = [
    "BackwardPass",
    "BufferOpInstruction",
    "DataParallelSchedule",
    "ForwardPass",
    "InferenceSchedule",
    "LoadMicroBatch",
    "OptimizerStep",
    "PipeInstruction",
    "PipeSchedule",
    "RecvActivation",
    "RecvGrad",
    "ReduceGrads",
    "ReduceTiedGrads",
    "SendActivation",
    "SendGrad",
    "TrainSchedule",
]


class PipeInstruction:
    """Something a stage does in a step. `name` is the class's; `kwargs` become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.name = type(self).__name__
        self.kwargs = kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.kwargs.items())})"


class OptimizerStep(PipeInstruction):
    """Step the optimizer, then zero the gradients; after ReduceGrads and ReduceTiedGrads."""


class ReduceGrads(PipeInstruction):
    """Reduce the gradients over the data-parallel ranks of the stage."""


class ReduceTiedGrads(PipeInstruction):
    """Reduce the gradients of tied parameters over the stages that hold them."""


class BufferOpInstruction(PipeInstruction):
    """An instruction on pipeline buffer `buffer_id`."""

    buffer_id: int

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Load a micro-batch: inputs on the first stage, labels on the last."""


class ForwardPass(BufferOpInstruction):
    """Forward of what is in the buffer."""


class BackwardPass(BufferOpInstruction):
    """Backward through what is in the buffer."""


class SendActivation(BufferOpInstruction):
    """Send the buffer's outputs to the next stage."""


class RecvActivation(BufferOpInstruction):
    """Receive the buffer's inputs from the previous stage."""


class SendGrad(BufferOpInstruction):
    """Send the gradient of the buffer's inputs to the previous stage."""


class RecvGrad(BufferOpInstruction):
    """Receive the gradient of the buffer's outputs from the next stage."""


class PipeSchedule(ABC):
    """The instructions of one stage: iterating yields a list per step. `steps()` is what a subclass writes."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches = micro_batches
        self.stages = stages
        self.stage_id = stage_id
        self.prev_stage = stage_id - 1
        self.next_stage = stage_id + 1

    @abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each step."""

    def num_pipe_buffers(self) -> int:
        """How many buffers the stage needs."""
        return self.micro_batches

    @property
    def stage(self) -> int:
        return self.stage_id

    @property
    def num_stages(self) -> int:
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.stages - 1

    def _valid_micro_batch(self, micro_batch_id: int) -> bool:
        return 0 <= micro_batch_id < self.micro_batches

    def _valid_stage(self, stage_id: int) -> bool:
        return 0 <= stage_id < self.stages

    def _buffer_idx(self, micro_batch_id: int) -> int:
        assert self._valid_micro_batch(micro_batch_id)
        return micro_batch_id % self.num_pipe_buffers()

    def __iter__(self) -> Iterator[list[PipeInstruction]]:
        return self.steps()


class InferenceSchedule(PipeSchedule):
    """Forward only, m + p - 1 steps, two buffers in turn."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for step in range(self.micro_batches + self.stages - 1):
            micro_batch = step - self.stage_id
            even = self.stage_id % 2 == 0
            recv_buffer, send_buffer = (step % 2, (step + 1) % 2) if even else ((step + 1) % 2, step % 2)
            now: list[PipeInstruction] = []
            if (self.is_first_stage or self.is_last_stage) and self._valid_micro_batch(micro_batch):
                now.append(LoadMicroBatch(recv_buffer))
            send: list[PipeInstruction] = []
            if self._valid_stage(self.next_stage) and self._valid_micro_batch(micro_batch - 1):
                send.append(SendActivation(send_buffer))
            recv: list[PipeInstruction] = []
            if self._valid_stage(self.prev_stage) and self._valid_micro_batch(micro_batch):
                recv.append(RecvActivation(recv_buffer))
            now += send + recv if even else recv + send
            if self._valid_micro_batch(micro_batch):
                now.append(ForwardPass(recv_buffer))
            yield now

    def num_pipe_buffers(self) -> int:
        return 2


class TrainSchedule(PipeSchedule):
    """1F1B on one clock, 2(m + p - 1) steps; the last one reduces and steps."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        previous = -1
        num_steps = 2 * (self.micro_batches + self.stages - 1)
        for step in range(num_steps):
            micro_batch, is_forward = self._step_to_micro_batch(step)
            valid = self._valid_micro_batch(micro_batch)
            now: list[PipeInstruction] = []
            if is_forward:
                if self._valid_stage(self.prev_stage):
                    if self._valid_micro_batch(previous):
                        now.append(SendGrad(self._buffer_idx(previous)))
                    if valid:
                        now.append(RecvActivation(self._buffer_idx(micro_batch)))
                if valid:
                    if self.is_first_stage or self.is_last_stage:
                        now.append(LoadMicroBatch(self._buffer_idx(micro_batch)))
                    now.append(ForwardPass(self._buffer_idx(micro_batch)))
            else:
                if self._valid_stage(self.next_stage):
                    if valid:
                        now.append(RecvGrad(self._buffer_idx(micro_batch)))
                    if self._valid_micro_batch(previous):
                        now.append(SendActivation(self._buffer_idx(previous)))
                if valid:
                    now.append(BackwardPass(self._buffer_idx(micro_batch)))
            if step == num_steps - 1:
                now += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            previous = micro_batch
            yield now

    def num_pipe_buffers(self) -> int:
        """One per micro-batch in flight, at least two."""
        return max(2, min(self.stages - self.stage_id, self.micro_batches))

    def _step_to_micro_batch(self, step: int) -> tuple[int, bool]:
        """The micro-batch that this stage has at `step` (perhaps outside [0, m)), and whether it is a forward."""
        if step % 2 == self.stage_id % 2:
            return step // 2 - self.stage_id // 2, True
        if step % 2 == 0:
            return step // 2 - self.stages + (self.stage_id + 1) // 2, False
        return (step - 1) // 2 - self.stages + 1 + self.stage_id // 2, False


class DataParallelSchedule(PipeSchedule):
    """No pipeline: load, forward and backward in each step, one buffer; the last step reduces and steps."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for step in range(self.micro_batches):
            now: list[PipeInstruction] = [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0)]
            if step == self.micro_batches - 1:
                now += [ReduceGrads(), OptimizerStep()]
            yield now

    def num_pipe_buffers(self) -> int:
        return 1
