"""One walk over a rank's part of a program: the table action -> method.

`Stage` is what stays from batch to batch, `Run` one batch on its way. A receive is posted where the program has it and
waited for at the action that needs it; a send starts where the program has it; between two chunks of one rank a result
is handed over without a message, detached, so that each chunk's backward ends at its own inputs.

Invariants. The time between an action's payload being there and its result is what observers are told; waiting is not
in it. What a micro-batch keeps of a chunk is dropped in its B, or its I and W. `end_micro_batch` is told in ascending
order, when every chunk of the rank has delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
from ds_pipe._channels import ACTIVATION, EVALUATION, GRADIENT, Channels
from ds_pipe._p2p import Incoming, flatten
from ds_pipe._split import Record, SplitBackward
from ds_pipe._ties import Ties
from ds_pipe.errors import PipelineError
from ds_pipe.module import PipelineModule
from ds_pipe.rng import Seeds, seeded
from ds_pipe.schedule.action import Action
from ds_pipe.schedule.lower import Op, Recv, Send, Transfer
from ds_pipe.sync import GradientSync

__all__ = ["Around", "LossFn", "Observer", "Run", "Stage"]

LossFn = Callable[[Any, Any], Tensor]
Observer = Callable[[Action, float, float], object]
Around = Callable[[Action, Any], AbstractContextManager[object]]


@dataclass
class Stage:
    """This rank's part of the model and what runs it.

    `virtuals` are the virtual stages of its chunks, `splits` their I and W (None: whole backwards), but for the
    (micro-batch, chunk) in `fused`, whose I does all of it. Chunks `in_place` have modules that may write to what they
    are given, which autograd forbids for a graph's inputs: they get copies. `around` is entered for each action, with
    its payload.
    """

    model: nn.Module
    virtuals: tuple[int, ...]
    last: int
    loss_fn: LossFn
    device: torch.device
    channels: Channels
    ties: Ties | None
    splits: tuple[SplitBackward | None, ...]
    fused: frozenset[tuple[int, int]]
    in_place: frozenset[int]
    sync: GradientSync
    observers: list[Observer] = field(default_factory=list)
    around: Around | None = None

    def call(self, inputs: Any, chunk: int, seeds: Seeds | None) -> Any:
        if isinstance(self.model, PipelineModule):
            return self.model(inputs, chunk, seeds)
        if seeds is None:
            return self.model(inputs)
        first_layer = self.virtuals[chunk]
        return seeded([self.model], inputs, **seeds._asdict(), first_layer=first_layer, device=self.device)


class Run:
    """One batch. `data` are (inputs, labels) per micro-batch, where this rank needs them.

    Training runs with `seeds` per micro-batch or None. Without `training` it only goes forward; `with_loss` and
    `with_outputs` say what the rank of the last virtual stage collects in `losses` and `outputs`.
    """

    def __init__(
        self,
        stage: Stage,
        data: Sequence[tuple[Any, Any]],
        *,
        training: bool,
        with_loss: bool = True,
        with_outputs: bool = False,
        seeds: Callable[[int], Seeds] | None = None,
    ) -> None:
        self.losses: list[Tensor] = []
        self.outputs: list[Any] = []
        self._stage = stage
        self._data = data
        self._training = training
        self._with_loss = with_loss
        self._with_outputs = with_outputs
        self._seeds = seeds
        self._activation = ACTIVATION if training else EVALUATION
        self._incoming: dict[Transfer, Incoming] = {}
        self._outgoing: dict[Transfer, Any] = {}
        self._live: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}  # inputs, outputs with gradients
        self._records: dict[tuple[int, int], Record] = {}
        self._delivered: dict[int, int] = {}
        self._next_micro_batch = 0

    def walk(self, program: Sequence[Op]) -> None:
        stage, channels = self._stage, self._stage.channels
        do = {"F": self._forward, "B": self._backward, "I": self._input_gradients, "W": self._weight_gradients}
        for op in program:
            if isinstance(op, Recv):
                transfer = op.transfer
                self._incoming[transfer] = channels.post(self._purpose(transfer), transfer.source, op.peer)
            elif isinstance(op, Send):
                transfer = op.transfer
                channels.send(self._purpose(transfer), transfer.source, op.peer, self._outgoing.pop(transfer))
            else:
                payload = self._payload(op)
                if stage.around is not None:
                    with stage.around(op, payload):
                        do[op.kind](op.micro_batch, op.chunk, payload)
                elif stage.observers:
                    start = self._now()
                    do[op.kind](op.micro_batch, op.chunk, payload)
                    end = self._now()
                    for observer in stage.observers:
                        observer(op, start, end)
                else:
                    do[op.kind](op.micro_batch, op.chunk, payload)

    def _now(self) -> float:
        if self._stage.device.type != "cpu":
            ds_comm.device.synchronize()
        return perf_counter()

    def _purpose(self, transfer: Transfer) -> int:
        return self._activation if transfer.payload == "activation" else GRADIENT

    def _payload(self, action: Action) -> Any:
        """What the action works on, once it is there: inputs, the outputs' gradients, or nothing."""
        kind, _, i, chunk = action
        virtual = self._stage.virtuals[chunk]
        if kind == "F":
            if virtual == 0:
                return self._data[i][0]
            transfer = Transfer("activation", i, virtual - 1, virtual)
        elif kind == "W":
            return None
        elif virtual == self._stage.last:
            return [None]
        else:
            transfer = Transfer("gradient", i, virtual + 1, virtual)
        incoming = self._incoming.pop(transfer, None)
        if incoming is not None:
            return incoming.wait()
        local = self._outgoing.pop(transfer)
        return _mapped(local, _detached) if kind == "F" else local

    def _forward(self, i: int, chunk: int, inputs: Any) -> None:
        stage, virtual = self._stage, self._stage.virtuals[chunk]
        split = stage.splits[chunk] if self._training and (i, chunk) not in stage.fused else None
        record = Record()
        given = _mapped(inputs, _copied) if self._training and virtual and chunk in stage.in_place else inputs
        with split.watching(record) if split is not None else nullcontext():
            outputs = stage.call(given, chunk, None if self._seeds is None else self._seeds(i))
            if virtual < stage.last:
                self._outgoing[Transfer("activation", i, virtual, virtual + 1)] = outputs
            else:
                outputs = self._end(i, outputs)
        if self._training:
            self._live[i, chunk] = (_with_gradients(inputs) if virtual else [], _with_gradients(outputs))
            if split is not None:
                self._records[i, chunk] = record

    def _end(self, i: int, outputs: Any) -> Any:
        """At the last virtual stage: collect what is asked for; returns what backward starts from."""
        if self._with_outputs:
            self.outputs.append(outputs)
        if not self._with_loss:
            return None
        loss = self._stage.loss_fn(outputs, self._data[i][1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PipelineError(f"loss_fn returned {found}; expected a scalar tensor, the mean over the micro-batch")
        loss = loss.reshape(()) if loss.dim() else loss
        self.losses.append(loss.detach())
        return self._stage.sync.scaled(loss) if self._training else None

    def _backward(self, i: int, chunk: int, gradients: list[Tensor | None]) -> None:
        stage, virtual = self._stage, self._stage.virtuals[chunk]
        if (i, chunk) in self._records:
            self._input_gradients(i, chunk, gradients)
            self._weight_gradients(i, chunk, None)
            return
        inputs, outputs = self._live.pop((i, chunk))
        with stage.ties.in_backward(virtual, stage.sync) if stage.ties is not None else nullcontext():
            if outputs:
                torch.autograd.backward(outputs, gradients)
        self._pass_back(i, virtual, inputs, [tensor.grad for tensor in inputs])
        self._end_chunk(i, chunk)

    def _input_gradients(self, i: int, chunk: int, gradients: list[Tensor | None]) -> None:
        stage, virtual = self._stage, self._stage.virtuals[chunk]
        split, record = stage.splits[chunk], self._records.get((i, chunk))
        if split is None or record is None:
            self._backward(i, chunk, gradients)
            return
        inputs, outputs = self._live.pop((i, chunk))
        found = split.input_gradients(record, outputs, gradients, inputs)
        if stage.ties is not None:
            stage.ties.exchange(virtual, record, stage.sync)
        self._pass_back(i, virtual, inputs, found)

    def _weight_gradients(self, i: int, chunk: int, _: Any) -> None:
        split, record = self._stage.splits[chunk], self._records.pop((i, chunk), None)
        if split is None or record is None:  # done with its I
            return
        with self._stage.sync.whole(split.parameters):
            split.accumulate(record)
        self._end_chunk(i, chunk)

    def _pass_back(self, i: int, virtual: int, inputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        if virtual:
            found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]
            self._outgoing[Transfer("gradient", i, virtual, virtual - 1)] = found

    def _end_chunk(self, i: int, chunk: int) -> None:
        self._stage.sync.end_chunk(chunk, i)
        self._delivered[i] = self._delivered.get(i, 0) + 1
        while self._delivered.get(self._next_micro_batch) == len(self._stage.virtuals):
            del self._delivered[self._next_micro_batch]
            self._stage.sync.end_micro_batch(self._next_micro_batch)
            self._next_micro_batch += 1


def _with_gradients(payload: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(payload, tensors)
    return [tensor for tensor in tensors if tensor.requires_grad]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.requires_grad else tensor


def _mapped(payload: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The payload with `function` of its tensors, in the containers that one from another rank has."""
    if isinstance(payload, Tensor):
        return function(payload)
    if isinstance(payload, tuple | list):
        items = [_mapped(item, function) for item in payload]
        return tuple(items) if isinstance(payload, tuple) else items
    if isinstance(payload, dict):
        return {key: _mapped(item, function) for key, item in payload.items()}
    return payload
