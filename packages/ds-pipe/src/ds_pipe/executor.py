"""`pipeline`: run a schedule over the stages of a model, one rank each.

Every rank walks its part of the schedule's proven program (`_run`). All training schedules run: one or several chunks
per rank (`PipelineModule(num_chunks=, placement=)`), backward whole or split into input and weight gradients
(`_split`).

Invariants. Each micro-batch's loss is divided by the number of micro-batches (by `PlainSync`) and gradients accumulate
in ascending micro-batch order, so that losses, gradients and weights are those of the unsplit model that accumulates
the same micro-batches (to the bit where the layers do not depend on the strides of their inputs). What a stage hands on
and no later one uses gets a gradient of zeros, where the unsplit model has none. Tied weights are summed once
(`_ties`). A failure on one stage is a PipelineError on all, and final: make a new group and a new pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
from ds_pipe._channels import ACTIVATION, EVALUATION, GRADIENT, Channels
from ds_pipe._run import Around, LossFn, Observer, Run, Stage
from ds_pipe._setup import fused, in_place, splits, take
from ds_pipe._ties import Ties
from ds_pipe.errors import PipelineError
from ds_pipe.module import PipelineModule
from ds_pipe.rng import Seeds
from ds_pipe.schedule.action import Schedule
from ds_pipe.schedule.choose import build
from ds_pipe.schedule.inference import inference
from ds_pipe.schedule.lower import Op, Send
from ds_pipe.schedule.validate import validate
from ds_pipe.sync import GradientSync, PlainSync

__all__ = ["Pipeline", "pipeline"]


def pipeline(
    model: nn.Module,
    *,
    schedule: str | Schedule = "1f1b",
    num_micro_batches: int = 1,
    loss_fn: LossFn | None = None,
    group: dist.ProcessGroup | None = None,
    dynamic_shape: bool = False,
    gradient_sync: GradientSync | None = None,
    dropout_seed: int | None = None,
) -> Pipeline:
    """This rank's stage of a running pipeline.

    Args:
        model: a `PipelineModule`, or any module that is this rank's stage (then `group`'s ranks are the stages).
        schedule: "1f1b", "gpipe", "zb_h1", "interleaved" (a module with several chunks in a "loop"), "zb_v" (two in a
            "v"), or a training `Schedule` with the module's chunks and placement.
        loss_fn: loss_fn(outputs, labels) -> scalar, the mean over a micro-batch; default: the module's. Every stage
            is given one, that of the last layers calls it.
        dynamic_shape: activations may change shape between micro-batches; costs two short messages per transfer.
        gradient_sync: how gradients are kept and reduced over replicas; default: `.grad` of this rank alone.
        dropout_seed: in training every layer draws by a seed of its own for each (step, micro-batch, layer), so that
            dropout does not depend on the split (`ds_pipe.rng`). Give the replicas of a pipeline different ones.
            None: layers draw from each rank's own generator.

    PipelineError or ScheduleError when these do not fit each other.
    """
    num_chunks = 1
    placement: tuple[int, ...] = ()
    if isinstance(model, PipelineModule):
        if group is not None:
            raise PipelineError("group was given with a PipelineModule, which has its own; leave it out")
        group = model.group
        loss_fn = loss_fn or model.loss_fn
        dynamic_shape = dynamic_shape or model.dynamic_shape
        num_chunks, placement = model.num_chunks, model.placement
    if loss_fn is None:
        raise PipelineError("no loss_fn; give every stage loss_fn(outputs, labels) -> scalar tensor")
    if not ds_comm.is_initialized():
        ds_comm.init_distributed()
    num_stages = ds_comm.get_world_size(group)
    placement = placement or tuple(range(num_stages))
    if isinstance(schedule, str):
        # A module without chunks is told below which ones the schedule needs.
        schedule = build(schedule, num_stages, num_micro_batches, num_chunks if num_chunks > 1 else None)
    if (schedule.num_stages, schedule.num_micro_batches) != (num_stages, num_micro_batches):
        raise PipelineError(
            f"the schedule has {schedule.num_stages} stages and {schedule.num_micro_batches} micro-batches; expected "
            f"the group's {num_stages} ranks and num_micro_batches = {num_micro_batches}"
        )
    if schedule.forward_only:
        raise PipelineError(f"schedule {schedule.name!r} only goes forward; expected one that trains, such as '1f1b'")
    if schedule.placement != placement:
        raise PipelineError(
            f"schedule {schedule.name!r} has {schedule.num_chunks} chunk(s) per stage, on the stages "
            f"{schedule.placement}; the module has {num_chunks}, on {placement}: give PipelineModule num_chunks= and "
            "placement= ('v' for zb_v, 'loop' else)"
        )
    return Pipeline(model, schedule, loss_fn, group, dynamic_shape, gradient_sync or PlainSync(), dropout_seed)


class Pipeline:
    """What `pipeline` returns: `train_batch`, `eval_batch` and `inference`, which every stage calls alike.

    `step` counts the calls of train_batch (settable, for a run that goes on from a checkpoint).
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        loss_fn: LossFn,
        group: dist.ProcessGroup | None,
        dynamic_shape: bool,
        gradient_sync: GradientSync,
        dropout_seed: int | None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.stage_id, self.num_stages = ds_comm.get_rank(group), schedule.num_stages
        self.step = 0
        self.group = group
        self._dropout_seed = dropout_seed
        self._programs: dict[int, tuple[Op, ...]] = {}  # forward only, by number of micro-batches
        self._program = validate(schedule)[self.stage_id]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._channels = Channels(group, self.stage_id, device, dynamic_shape)
        for op in self._program:
            if isinstance(op, Send):
                purposes = (ACTIVATION, EVALUATION) if op.transfer.payload == "activation" else (GRADIENT,)
                for purpose in purposes:
                    self._channels.open(purpose, op.transfer.source, op.peer)
        ties = model.ties() if isinstance(model, PipelineModule) else []
        self._ties = Ties(ties, schedule, self.stage_id, self._channels) if ties else None
        virtuals = schedule.chunks[self.stage_id]
        halves = splits(model, schedule, virtuals, ties)
        self._stage = Stage(
            model,
            virtuals,
            schedule.num_virtual_stages - 1,
            loss_fn,
            device,
            self._channels,
            self._ties,
            halves,
            fused(self._program, virtuals, ties, halves),
            in_place(model, len(virtuals)),
            gradient_sync,
        )
        self._failure: str | None = None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first layers, which take the inputs."""
        return self.schedule.placement[0] == self.stage_id

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers, and with them outputs and loss (the first rank with zb_v)."""
        return self.schedule.placement[-1] == self.stage_id

    @property
    def observers(self) -> list[Observer]:
        """Called as observer(action, start, end) after each action, in seconds of `time.perf_counter`.

        Where an I and its W are done as one (nobody waits for what I finds), the time is all I's.
        """
        return self._stage.observers

    @contextmanager
    def watched(self, around: Around) -> Iterator[None]:
        """Inside, every action runs in the context around(action, payload), and observers are not called."""
        self._stage.around = around
        try:
            yield
        finally:
            self._stage.around = None

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
            num, sync = self.schedule.num_micro_batches, self._stage.sync
            seeds = None
            if self._dropout_seed is not None and self.model.training:
                seeds = partial(Seeds, self._dropout_seed, self.step)
            ends = self.is_first_stage or self.is_last_stage
            run = Run(self._stage, self._take(data_iter, num) if ends else [], training=True, seeds=seeds)
            sync.begin_batch(num)
            if self._ties is not None:
                self._ties.begin()
            run.walk(self._program)
            if self._ties is not None:
                self._ties.finish(sync)
            self._channels.drain()
            loss = self._share(self._mean(run.losses, num))
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            return loss

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None = None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """The mean loss (fp32 scalar) of `num_micro_batches` (default: as in training) on every stage.

        Runs in evaluation mode without gradients; every module's mode is as before afterwards. Shapes may be others
        than in training and in the evaluation before. `reduce_output` None
        gives the losses of the micro-batches, fp32 [num], instead of their mean; without `bcast_loss` only the stage
        of the last layers has them, others get None. `return_logits` gives a pair (loss, outputs), the last layers'
        outputs per micro-batch in a list on their stage, None elsewhere. Without `compute_loss` there is no loss, and
        those outputs (their mean over micro-batches with "avg") stand in its place; labels may be None.
        """
        if reduce_output not in ("avg", None):
            raise PipelineError(f"reduce_output is {reduce_output!r}; expected 'avg' or None")
        num = self.schedule.num_micro_batches if num_micro_batches is None else num_micro_batches
        with self._failing_together(), self._evaluating():
            needs_data = self.is_first_stage or (self.is_last_stage and compute_loss)
            data = self._take(data_iter, num) if needs_data else [(None, None)] * num
            run = Run(
                self._stage,
                data,
                training=False,
                with_loss=compute_loss,
                with_outputs=return_logits or not compute_loss,
            )
            run.walk(self._forward_program(num))
            self._channels.drain()
            result: Any = None
            if compute_loss:
                mean = reduce_output == "avg"
                found = self._mean(run.losses, num) if mean else self._stacked(run.losses, num)
                result = self._share(found) if bcast_loss else found if self.is_last_stage else None
            elif self.is_last_stage:
                result = sum(run.outputs[1:], run.outputs[0]) / num if reduce_output == "avg" else run.outputs
            if return_logits:
                return result, run.outputs if self.is_last_stage else None
            return result

    def inference(
        self, data_iter: Iterator[Any] | None = None, num_micro_batches: int | None = None
    ) -> list[Any] | None:
        """The last layers' outputs per micro-batch, on their stage (None elsewhere), in evaluation mode.

        `data_iter` yields inputs alone; only the stage of the first layers needs one.
        """
        num = self.schedule.num_micro_batches if num_micro_batches is None else num_micro_batches
        with self._failing_together(), self._evaluating():
            data = self._take(data_iter, num, labelled=False) if self.is_first_stage else [(None, None)] * num
            run = Run(self._stage, data, training=False, with_loss=False, with_outputs=True)
            run.walk(self._forward_program(num))
            self._channels.drain()
            ds_comm.barrier(group=self.group)
            return run.outputs if self.is_last_stage else None

    def _take(self, data_iter: Iterator[Any] | None, num: int, *, labelled: bool = True) -> list[tuple[Any, Any]]:
        return take(data_iter, num, self.stage_id, labelled=labelled)

    def _forward_program(self, num: int) -> tuple[Op, ...]:
        if num not in self._programs:
            plan = inference(self.num_stages, num, self.schedule.num_chunks, self.schedule.placement)
            self._programs[num] = validate(plan)[self.stage_id]
        return self._programs[num]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._channels.renew(EVALUATION)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:  # parents first, and each may have a mode of its own
                if module.training != training:
                    module.train(training)

    def _mean(self, losses: list[Tensor], num: int) -> Tensor:
        total = torch.zeros((), device=self._stage.device)
        for loss in losses:
            total += loss
        return total / num

    def _stacked(self, losses: list[Tensor], num: int) -> Tensor:
        return torch.stack(losses).float() if losses else torch.zeros(num, device=self._stage.device)

    def _share(self, loss: Tensor) -> Tensor:
        ds_comm.broadcast(loss, group=self.group, group_src=self.schedule.placement[-1], label="loss")
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
            self._channels.fail(text)
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(text) from error
