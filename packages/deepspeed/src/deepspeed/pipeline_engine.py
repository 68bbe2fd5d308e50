"""PipelineEngine: upstream's interface for training a `PipelineModule`, over ds_pipe's executor and ds_zero.

The ranks are a grid of stages ("pipe") and replicas ("data"). Along "pipe" `ds_pipe` runs the schedule; along "data"
each stage is sharded and reduced by `ds_zero` at any ZeRO stage, so that a pipeline over data-parallel ranks gives the
bits of those ranks without a pipeline. What the stages do together at the boundary (the norm, skipping a step) is
ds_zero's `ModelPart`; a checkpoint is one for all of them and loads at another (stages x replicas).

Vocabulary: a *micro-batch* of a pipeline is what the plain engine calls a micro-step; their number is
`gradient_accumulation_steps`. `train_batch_size` counts the samples of all replicas of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ds_comm
import ds_pipe
import ds_zero
from deepspeed import checkpoint_io
from deepspeed._pipe_sync import ZeroSync
from deepspeed.config import ResolvedConfig
from deepspeed.dataloader import RepeatingLoader
from deepspeed.engine import DeepSpeedEngine, half
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError
from deepspeed.progress import STEP, TRAIN_BATCH
from ds_pipe import PipelineError, PipelineModule

__all__ = ["PipelineEngine"]


class PipelineEngine(DeepSpeedEngine):
    """One stage of a pipeline, ready to train. Made by `deepspeed.initialize(model=PipelineModule(...))`.

    Attributes:
        grid: `ds_pipe.PipelineParallelGrid`, also as `mpu`. stage_id, num_stages: along its axis "pipe".
        micro_batches: per step and replica, that is `gradient_accumulation_steps`.
    """

    def __init__(self, model: PipelineModule, config: ResolvedConfig, **arguments: Any) -> None:
        self.grid: ds_pipe.PipelineParallelGrid = arguments["mpu"]
        self.num_stages, self.stage_id = model.num_stages, model.stage_id
        _check_config(config, model, self.grid)
        super().__init__(model, config, **arguments)
        if config.pipeline.activation_checkpoint_interval:
            model.set_checkpoint_interval(config.pipeline.activation_checkpoint_interval)
        maps: list[Any] = [None] * self.num_stages
        ds_comm.all_gather_object(maps, self.sharded.shard_map, group=model.group, label="shard maps of the stages")
        self._whole_map = ds_zero.ShardMap.joined(maps)
        self._data: Iterator[Any] | None = None
        self._batch_fn: Callable[[Any], Any] | None = None
        self._runner = self._make_runner()
        self.is_pipe_parallel = self.num_stages > 1
        self.splits_backward = _schedule_name(config.pipeline.schedule, model) in ("zb_h1", "zb_v")
        self.is_data_parallel = self.dp_world_size > 1
        self.is_model_parallel = False

    @property
    def _pipeline(self) -> PipelineModule:
        assert isinstance(self.module, PipelineModule)
        return self.module

    def _choose_device(self, index: int | None) -> None:
        super()._choose_device(index)
        self.mp_world_size = self.grid.model_parallel_size

    def _sharding(self) -> dict[str, Any]:
        """This stage as part of the model; each layer with children (a transformer block) is gathered as a whole."""
        module = self._pipeline
        others = [p for _, p, stages in module.tied_parameters() if stages[0] != module.stage_id]
        lanes = [chunk.parameters() for chunk in module.chunks] if module.num_chunks > 1 else []
        part = ds_zero.ModelPart(ds_comm.communicator(module.group), others, lanes)
        blocks = [name for name, child in module.named_children() if name.isdigit() and any(child.children())]
        return {"part": part, "units": blocks or None}

    @property
    def checkpoint_scope(self) -> checkpoint_io.Scope:
        """All stages and replicas save together, each element once; the first replica saves the buffers."""
        layout = {"pipe": self.num_stages, "data": self.dp_world_size}
        first = self.get_data_parallel_rank() == 0
        group = ds_comm.get_world_group()
        return checkpoint_io.Scope(group, self._whole_map, layout, self.grid.get_pipe_parallel_group(), first)

    def _make_runner(self) -> ds_pipe.Pipeline:
        """The executor for the present number of micro-batches; collective."""
        trains = isinstance(self.optimizer, ds_zero.ZeroOptimizer)
        sync = ZeroSync(self.optimizer, self._pipeline.num_chunks) if trains else None
        return ds_pipe.pipeline(
            self.module,
            schedule=_schedule(self._config.pipeline.schedule, self._pipeline, self.micro_batches),
            num_micro_batches=self.micro_batches,
            gradient_sync=sync,
        )

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step and replica."""
        return int(self.gradient_accumulation_steps())

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One step over `micro_batches` micro-batches per replica; the mean loss over all of them, on every rank.

        Args:
            data_iter: yields (inputs, labels) micro-batches of this replica, the same on the first stage and the last;
                others need none. Default: what `set_dataiterator`, `set_dataloader` or `training_data` gave.
        Raises:
            RuntimeError: gradients are disabled. PipelineError: on every stage, when one of them fails or its data run
            dry; the engine cannot go on then.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled; leave torch.no_grad(), or use eval_batch()")
        optimizer = self._training_optimizer("train_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        self.tput_timer.start()
        self.timers(TRAIN_BATCH).start()
        with self._failing_together():
            loss = _mean_over(self.data_parallel_group, self._runner.train_batch(self._micro_batches()))
        self.timers(TRAIN_BATCH).stop()
        self.callbacks.after_backward(self, loss)
        self.timers(STEP).start()
        optimizer.step()
        self.timers(STEP).stop()
        self.micro_steps += self.micro_batches
        self._after_boundary(None)
        self.tput_timer.stop(global_step=True)
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
        """Forward only, in evaluation mode: the mean loss of `num_micro_batches` (default: as in training).

        Args:
            data_iter: as for `train_batch`; it is used for this batch only.
            return_logits: give (loss, outputs), the last layers' outputs per micro-batch on their stage, else None.
            compute_loss: False gives those outputs in the loss's place (their mean with "avg"), on that stage only.
            reduce_output: "avg" for the mean over micro-batches and replicas; None for each micro-batch's loss of this
                replica.
            bcast_loss: False leaves the loss on the stage of the last layers, None elsewhere.
        """
        with self._failing_together():
            result = self._runner.eval_batch(
                self._micro_batches(data_iter),
                return_logits=return_logits,
                compute_loss=compute_loss,
                reduce_output=reduce_output,
                bcast_loss=bcast_loss,
                num_micro_batches=num_micro_batches,
            )
            loss, outputs = result if return_logits else (result, None)
            if compute_loss and reduce_output is not None and loss is not None:
                loss = _mean_over(self.data_parallel_group, loss)
        return (loss, outputs) if return_logits else loss

    def inference_batch(self, inputs: Iterator[Any] | None, num_micro_batches: int | None = None) -> list[Any] | None:
        """The last layers' outputs per micro-batch, on their stage (None elsewhere).

        `inputs` yields inputs without labels; only the stage of the first layers needs it.
        """
        moved = None if inputs is None else (_moved(batch, self.device) for batch in inputs)
        with self._failing_together():
            return self._runner.inference(moved, num_micro_batches)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """A failure of one replica, of which its own stages know, is one of all: they wait for it in reductions."""
        try:
            yield
        except (PipelineError, ds_comm.CommError) as error:
            if self.dp_world_size > 1:
                with contextlib.suppress(ds_comm.CommError):  # it may be what failed
                    ds_comm.communicator(self.data_parallel_group).fail(ds_comm.CommError(str(error)))
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(str(error)) from error

    # -- data ----------------------------------------------------------------------------------------------------

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Take micro-batches from this iterator from now on."""
        self._data = iterator

    def set_dataloader(self, loader: Any) -> None:
        """Take micro-batches from this loader, again and again. It must give this replica its own samples."""
        self.training_dataloader = loader
        self._data = None

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Apply `fn` to each micro-batch that comes from the data; it returns (inputs, labels)."""
        self._batch_fn = fn

    def _micro_batches(self, given: Any = None) -> Any:
        """The stage's data as the executor takes them; None where no data are needed."""
        if not (self.is_first_stage() or self.is_last_stage()):
            return None
        if given is None:
            if self._data is None and self.training_dataloader is not None:
                self._data = RepeatingLoader(self.training_dataloader)
            given = self._data
        if given is not None and not isinstance(given, Iterator):  # iterated anew, it would give the same each time
            return given  # the executor refuses it, on all stages
        fp16 = self._config.fp16.enabled and self._config.fp16.auto_cast
        prepare = partial(_prepared, fn=self._batch_fn, halve=fp16, device=self.device)
        return given if given is None else map(prepare, given)

    # -- changes at run time --------------------------------------------------------------------------------------

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the batch by changing the number of micro-batches; ValueError if it does not divide."""
        super().set_train_batch_size(train_batch_size)
        self._runner = self._make_runner()

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, their number staying as it is."""
        super().set_train_micro_batch_size(micro_batch_size)
        self._runner = self._make_runner()

    def reset_activation_shape(self) -> None:
        """Let activations have another shape from the next batch on; call it on every rank."""
        self._runner = self._make_runner()

    # -- who is who ----------------------------------------------------------------------------------------------

    def is_first_stage(self) -> bool:
        """Whether this rank holds the first layers, which take the inputs."""
        return self._runner.is_first_stage

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers, and with them outputs and loss (the first stage with zb_v)."""
        return self._runner.is_last_stage

    def get_pipeline_parallel_rank(self) -> int:
        return self.stage_id

    def get_additional_losses(self) -> Any:
        """What the module's `get_additional_losses()` gives; None without one."""
        extra = getattr(self.module, "get_additional_losses", None)
        return None if extra is None else extra()

    # -- what a pipeline has no use for ---------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Raises PipelineError: one call runs the whole schedule."""
        raise PipelineError(_only("forward"))

    def backward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Raises PipelineError: one call runs the whole schedule."""
        raise PipelineError(_only("backward"))

    def step(self, *inputs: Any, **kwargs: Any) -> None:
        """Raises PipelineError: one call runs the whole schedule."""
        raise PipelineError(_only("step"))


def _mean_over(replicas: Any, loss: Tensor) -> Tensor:
    """The mean over the ranks of a group."""
    size = ds_comm.get_world_size(replicas)
    if size == 1:
        return loss
    total = loss.clone()
    ds_comm.all_reduce(total, group=replicas, label="loss over replicas")
    return total / size


def _only(what: str) -> str:
    return f"{what}() of a PipelineEngine: only train_batch() and eval_batch() are there, they run the whole schedule"


def _check_config(config: ResolvedConfig, module: PipelineModule, grid: ds_pipe.PipelineParallelGrid) -> None:
    stages = config.pipeline.stages
    if stages not in ("auto", module.num_stages):
        raise ConfigConflictError(
            f"pipeline.stages is {stages} ({config.origin}), but the PipelineModule has {module.num_stages} stages;"
            ' remove the key, set it to "auto", or give PipelineModule as many num_stages'
        )
    if grid.model_parallel_size > 1:
        raise PipelineError(
            f"the topology has {grid.model_parallel_size} ranks on its axis 'model'; expected 1: tensor parallelism"
            " inside a pipeline stage is not supported yet"
        )
    if config.torch_autocast.enabled:
        raise DeepSpeedConfigError(
            "torch_autocast.enabled is true, which a pipeline does not support; use bf16.enabled or fp16.enabled"
        )
    if config.curriculum_learning.enabled:
        raise DeepSpeedConfigError(
            "curriculum_learning.enabled is true, which a pipeline does not support; cut sequences in the loader, with"
            " deepspeed.runtime.data_pipeline.curriculum_scheduler.CurriculumScheduler"
        )
    if not config.managed_gradient_accumulation:
        raise DeepSpeedConfigError(
            "managed_gradient_accumulation is false, but the step of a pipeline is always train_batch(); set it to true"
        )


def _schedule_name(name: str, module: PipelineModule) -> str:
    """`name`, or for "auto" the schedule that fits the module's chunks, 1f1b for a single one."""
    if name != "auto":
        return name
    loop = module.placement == tuple(range(module.num_stages)) * module.num_chunks
    return "1f1b" if module.num_chunks == 1 else "interleaved" if loop else "zb_v"


def _schedule(name: str, module: PipelineModule, num_micro_batches: int) -> ds_pipe.Schedule:
    stages, chunks, name = module.num_stages, module.num_chunks, _schedule_name(name, module)
    return ds_pipe.build(name, stages, num_micro_batches, chunks if name == "interleaved" else None)


def _prepared(batch: Any, *, fn: Callable[[Any], Any] | None, halve: bool, device: torch.device) -> Any:
    """A micro-batch as the data give it, made (inputs, labels) on `device`, with floating inputs in fp16 if asked."""
    batch = batch if fn is None else fn(batch)
    if halve and isinstance(batch, (tuple, list)):
        batch = (half(batch[0]), *batch[1:])
    return _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return type(value)((key, _moved(item, device)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device) for item in value)
    return value
