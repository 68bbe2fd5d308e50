"""`pipeline`: run a schedule over the stages of a model, one rank each.

Every rank walks its part of the schedule's proven program: a receive is posted where the program has it and waited for
at the action that needs it; a send starts where the program has it. The schedules are those with one chunk per stage
and whole backwards: gpipe and 1f1b.

Invariants. Each micro-batch's loss is divided by the number of micro-batches and gradients accumulate in ascending
micro-batch order, so that losses, gradients and weights are those of the unsplit model that accumulates the same
micro-batches (to the bit where the layers do not depend on the strides of their inputs). Tied weights: per micro-batch
the later stages send their gradient to the owner, the first stage that holds the weight; it adds them from the last
stage to the first, as autograd does, and hands the sum back at the end. A failure on one stage is a PipelineError on
all, and final: make a new group and a new pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
from ds_pipe._p2p import Incoming, Outbox, Receiver, Sender, flatten
from ds_pipe.errors import PipelineError
from ds_pipe.module import PipelineModule
from ds_pipe.schedule.action import Schedule
from ds_pipe.schedule.choose import build
from ds_pipe.schedule.inference import inference
from ds_pipe.schedule.lower import Op, Recv, Send, Transfer
from ds_pipe.schedule.validate import validate

__all__ = ["Pipeline", "pipeline"]

LossFn = Callable[[Any, Any], Tensor]
_FORWARD, _GRADIENT, _EVALUATION, _TIED = 1, 2, 3, 4  # tags of messages
_SENDS_UNDER_WAY = 4  # the program is free of deadlock even with blocking sends, so waiting for old ones is safe


def pipeline(
    model: nn.Module,
    *,
    schedule: str | Schedule = "1f1b",
    num_micro_batches: int = 1,
    loss_fn: LossFn | None = None,
    group: dist.ProcessGroup | None = None,
    dynamic_shape: bool = False,
    sync_gradients: Callable[[], object] | None = None,
) -> Pipeline:
    """This rank's stage of a running pipeline.

    Args:
        model: a `PipelineModule`, or any module that is this rank's stage (then `group`'s ranks are the stages).
        schedule: "1f1b", "gpipe", or a `Schedule` with one chunk per stage and whole backwards.
        loss_fn: loss_fn(outputs, labels) -> scalar, the mean over a micro-batch; default: the module's. Every stage
            is given one, the last calls it.
        dynamic_shape: activations may change shape between micro-batches; costs two short messages per transfer.
        sync_gradients: called when all gradients are in `.grad`, before the optimizer: data parallelism's place.

    PipelineError or ScheduleError when these do not fit each other.
    """
    if isinstance(model, PipelineModule):
        if group is not None:
            raise PipelineError("group was given with a PipelineModule, which has its own; leave it out")
        group = model.group
        loss_fn = loss_fn or model.loss_fn
        dynamic_shape = dynamic_shape or model.dynamic_shape
    if loss_fn is None:
        raise PipelineError("no loss_fn; give every stage loss_fn(outputs, labels) -> scalar tensor")
    if not ds_comm.is_initialized():
        ds_comm.init_distributed()
    num_stages = ds_comm.get_world_size(group)
    if isinstance(schedule, str):
        schedule = build(schedule, num_stages, num_micro_batches)
    if (schedule.num_stages, schedule.num_micro_batches) != (num_stages, num_micro_batches):
        raise PipelineError(
            f"the schedule has {schedule.num_stages} stages and {schedule.num_micro_batches} micro-batches; expected "
            f"the group's {num_stages} ranks and num_micro_batches = {num_micro_batches}"
        )
    if schedule.num_chunks > 1 or schedule.splits_backward or schedule.forward_only:
        raise PipelineError(
            f"schedule {schedule.name!r} cannot be run; expected one with one chunk per stage and whole backwards: "
            "'1f1b' or 'gpipe'"
        )
    return Pipeline(model, schedule, loss_fn, group, dynamic_shape, sync_gradients)


class Pipeline:
    """What `pipeline` returns: `train_batch` and `eval_batch`, which every stage calls alike."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        loss_fn: LossFn,
        group: dist.ProcessGroup | None,
        dynamic_shape: bool,
        sync_gradients: Callable[[], object] | None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.stage_id, self.num_stages = ds_comm.get_rank(group), schedule.num_stages
        self._loss_fn = loss_fn
        self._group = group
        self._sync_gradients = sync_gradients
        self._program = validate(schedule)[self.stage_id]
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        before, after = self.stage_id - 1, self.stage_id + 1

        def end(kind: type[Sender] | type[Receiver], peer: int, tag: int, label: str) -> Any:
            label = f"{label} of stages {min(self.stage_id, peer)} and {max(self.stage_id, peer)}"
            return kind(group, peer, tag, label, self._device, dynamic_shape)

        self._senders: dict[int, Sender] = {}
        self._receivers: dict[int, Receiver] = {}
        for tag, label in ((_FORWARD, "activations"), (_EVALUATION, "evaluation")):
            if not self.is_last_stage:
                self._senders[tag] = end(Sender, after, tag, label)
            if not self.is_first_stage:
                self._receivers[tag] = end(Receiver, before, tag, label)
        if not self.is_first_stage:
            self._senders[_GRADIENT] = end(Sender, before, _GRADIENT, "gradients")
        if not self.is_last_stage:
            self._receivers[_GRADIENT] = end(Receiver, after, _GRADIENT, "gradients")
        self._outbox = Outbox(_SENDS_UNDER_WAY)
        self._tied = _Ties(model, group, self.stage_id) if isinstance(model, PipelineModule) else None
        self._failure: str | None = None

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def train_batch(
        self, data_iter: Iterator[Any] | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> Tensor:
        """One step over `num_micro_batches` micro-batches; returns their mean loss (fp32 scalar) on every stage.

        `data_iter` yields (inputs, labels), the same on the first stage and the last; others need none. `optimizer`
        holds this stage's parameters; it steps, and gradients are cleared. None leaves them in `.grad`.
        """
        with self._failing_together():
            if not torch.is_grad_enabled():
                raise PipelineError("train_batch() needs gradients, and they are disabled; leave torch.no_grad()")
            run = _Run(self, self._take(data_iter, self.schedule.num_micro_batches), _FORWARD)
            if self._tied is not None:
                self._tied.begin()
            run.walk(self._program)
            if self._tied is not None:
                self._tied.finish()
            self._outbox.drain()
            loss = self._share(run.total)
            if self._sync_gradients is not None:
                self._sync_gradients()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss

    def eval_batch(self, data_iter: Iterator[Any] | None = None, num_micro_batches: int | None = None) -> Tensor:
        """The mean loss (fp32 scalar) of `num_micro_batches` (default: as in training) on every stage.

        Runs in evaluation mode without gradients; the module's mode is as before afterwards.
        """
        num = self.schedule.num_micro_batches if num_micro_batches is None else num_micro_batches
        training = self.model.training
        with self._failing_together(), torch.no_grad():
            run = _Run(self, self._take(data_iter, num), _EVALUATION)
            self.model.eval()
            try:
                run.walk(validate(inference(self.num_stages, num))[self.stage_id])
            finally:
                self.model.train(training)
            self._outbox.drain()
            return self._share(run.total, num)

    def _take(self, data_iter: Iterator[Any] | None, num: int) -> list[tuple[Any, Any]]:
        if not (self.is_first_stage or self.is_last_stage):
            return []
        if not isinstance(data_iter, Iterator):
            raise PipelineError(
                f"stage {self.stage_id}: data_iter is {type(data_iter).__name__}; the first stage and the last need an "
                "iterator of (inputs, labels), such as iter(loader)"
            )
        taken: list[tuple[Any, Any]] = []
        while len(taken) < num:
            try:
                batch = next(data_iter)
            except StopIteration:
                raise PipelineError(
                    f"stage {self.stage_id}: the data iterator ran dry after {len(taken)} of {num} micro-batches; give "
                    "one with whole batches, or one that repeats"
                ) from None
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise PipelineError(f"a micro-batch is {type(batch).__name__}; expected a pair (inputs, labels)")
            taken.append((batch[0], batch[1]))
        return taken

    def _share(self, total: Tensor, num: int | None = None) -> Tensor:
        loss = total / (num or self.schedule.num_micro_batches)
        ds_comm.broadcast(loss, group=self._group, group_src=self.num_stages - 1, label="loss")
        return loss

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Turn what goes wrong here into a PipelineError on every stage."""
        if self._failure is not None:
            raise PipelineError(f"this pipeline has failed before and cannot go on: {self._failure}")
        try:
            yield
        except Exception as error:
            known = isinstance(error, PipelineError | ds_comm.CommError)
            text = str(error) if known else f"stage {self.stage_id}: {type(error).__name__}: {error}"
            self._failure = text
            self._outbox.limit = None  # nobody may be there to receive
            for sender in self._senders.values():
                with suppress(RuntimeError):  # the connection may be what failed
                    sender.fail(text, self._outbox)
            with suppress(ds_comm.CommError):  # who waits for something else: in the loss, or for another stage
                comm = ds_comm.communicator(self._group)
                comm.transport.fail(ds_comm.CommError(text))
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(text) from error


class _Run:
    """One walk over this stage's program."""

    def __init__(self, owner: Pipeline, data: list[tuple[Any, Any]], forward_tag: int) -> None:
        self.total = torch.zeros((), device=owner._device)
        self._owner = owner
        self._data = data
        self._forward_tag = forward_tag
        self._incoming: dict[Transfer, Incoming] = {}
        self._outgoing: dict[Transfer, Any] = {}
        self._live: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # per micro-batch: inputs, outputs with gradients

    def walk(self, program: tuple[Op, ...]) -> None:
        owner = self._owner
        for op in program:
            if isinstance(op, Recv):
                self._incoming[op.transfer] = owner._receivers[self._tag(op.transfer)].post()
            elif isinstance(op, Send):
                owner._senders[self._tag(op.transfer)].send(self._outgoing.pop(op.transfer), owner._outbox)
            elif op.kind == "F":
                self._forward(op.micro_batch)
            else:
                self._backward(op.micro_batch)

    def _tag(self, transfer: Transfer) -> int:
        return self._forward_tag if transfer.payload == "activation" else _GRADIENT

    def _forward(self, i: int) -> None:
        owner, stage = self._owner, self._owner.stage_id
        if owner.is_first_stage:
            inputs = self._data[i][0]
        else:
            inputs = self._incoming.pop(Transfer("activation", i, stage - 1, stage)).wait()
        outputs = owner.model(inputs)
        if owner.is_last_stage:
            loss = owner._loss_fn(outputs, self._data[i][1])
            self.total += loss.detach()
            outputs = loss / owner.schedule.num_micro_batches if self._forward_tag == _FORWARD else loss
        else:
            self._outgoing[Transfer("activation", i, stage, stage + 1)] = outputs
        if self._forward_tag == _FORWARD:
            self._live[i] = ([] if owner.is_first_stage else _with_gradients(inputs), _with_gradients(outputs))

    def _backward(self, i: int) -> None:
        owner, stage = self._owner, self._owner.stage_id
        inputs, outputs = self._live.pop(i)
        gradients: list[Tensor | None] = [None]
        if not owner.is_last_stage:
            gradients = self._incoming.pop(Transfer("gradient", i, stage + 1, stage)).wait()
        if outputs:
            torch.autograd.backward(outputs, gradients)
        if not owner.is_first_stage:
            found = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
            self._outgoing[Transfer("gradient", i, stage, stage - 1)] = found
        if owner._tied is not None:
            owner._tied.end_micro_batch()


class _Ties:
    """The gradients of weights that several stages hold."""

    def __init__(self, module: PipelineModule, group: dist.ProcessGroup | None, stage_id: int) -> None:
        self._tied = [tie for tie in module.tied_parameters() if tie[1].requires_grad]
        self._group = group
        self._stage = stage_id
        self._outbox = Outbox()
        self._sums: dict[str, Tensor | None] = {}

    def begin(self) -> None:
        for name, parameter, _ in self._tied:
            self._sums[name], parameter.grad = parameter.grad, None

    def end_micro_batch(self) -> None:
        """Add this micro-batch's gradients, at the owners."""
        for name, parameter, stages in self._tied:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if self._stage != stages[0]:
                self._outbox.put(own.contiguous(), self._group, stages[0], _TIED, f"tied {name}")
                continue
            others = [self._receive(own, stage, name) for stage in reversed(stages[1:])]
            total = others[0]
            for more in (*others[1:], own):
                total = total + more
            before = self._sums[name]
            self._sums[name] = total if before is None else before + total

    def finish(self) -> None:
        """Put the sums into `.grad` on every stage."""
        for name, parameter, stages in self._tied:
            total = self._sums.pop(name)
            if self._stage != stages[0]:
                parameter.grad = self._receive(parameter, stages[0], name)
                continue
            assert total is not None
            for stage in stages[1:]:
                self._outbox.put(total, self._group, stage, _TIED, f"tied {name}")
            parameter.grad = total
        self._outbox.drain()

    def _receive(self, like: Tensor, stage: int, name: str) -> Tensor:
        found = torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
        ds_comm.irecv(found, group=self._group, tag=_TIED, group_src=stage, label=f"tied {name}").wait()
        return found


def _with_gradients(payload: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(payload, tensors)
    return [tensor for tensor in tensors if tensor.requires_grad]
