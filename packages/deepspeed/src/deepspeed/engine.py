"""DeepSpeedEngine: upstream's training interface over ds_zero.

What it owns: the counters, the boundary of accumulation, and the wiring of optimizer, scheduler, data, checkpoints
and listeners. What it does not: the mathematics (ds_zero), files (checkpoint_io), config values (the getters come from
one table in `config.getters`). Features that watch training subscribe to `callbacks`.

Vocabulary: a *micro-step* is one forward and backward; a *step* is one optimizer step; the *boundary* is the
micro-step that ends a step. `step()` may be called after every micro-step: it acts at the boundary only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
import ds_comm.device
import ds_zero
from deepspeed import checkpoint_io
from deepspeed.compilation import CompiledModel, compile_model, refuse_compile_pass
from deepspeed.config import ConfigGetters, ResolvedConfig
from deepspeed.config.getters import TORCH_DTYPES
from deepspeed.config.translate import zero_config
from deepspeed.curriculum import CurriculumMethods, curriculum_of
from deepspeed.dataloader import DeepSpeedDataLoader
from deepspeed.events import Callback, CallbackList
from deepspeed.moe.marks import engine_has_moe_layers
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.progress import BACKWARD, FORWARD, STEP, progress_listeners
from deepspeed.sequence.ranks import DataRanks, is_model_parallel
from deepspeed.settings import fused_kernels, recompute_plan
from deepspeed.state_offload import StateOffloading
from deepspeed.tensor_parallel import applied_to, model_part
from deepspeed.timers import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer
from deepspeed.utils import groups
from deepspeed.utils.logging import log_dist

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(ConfigGetters, CurriculumMethods, StateOffloading, nn.Module):
    """A model with its optimizer, ready to train. Made by `deepspeed.initialize`.

    Attributes:
        module: the client's model object. optimizer: ZeroOptimizer, or what stands for it without one.
        basic_optimizer: the torch optimizer inside. lr_scheduler: may be replaced or set to None at any time.
        global_steps, global_samples, micro_steps, skipped_steps: counters since the beginning of training.
        callbacks: listeners (`deepspeed.events.Callback`). compiled: what `compile` did, None before.
        recompute: what `activation_checkpointing.policy` makes of the blocks, None without it.
        kernels: what the section `kernels` replaced in the model, None without it.
    """

    splits_backward = False
    """Whether the two halves of a backward run apart, as some pipeline schedules have it."""

    def __init__(
        self,
        model: nn.Module,
        config: ResolvedConfig,
        *,
        optimizer: torch.optim.Optimizer | None,
        group: Any = None,
        mpu: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        device_index: int | None = None,
        client_optimizer: Any = None,
        ranks: DataRanks | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self.mpu = mpu
        self.collate_fn = collate_fn
        self.data_parallel_group = group
        self._ranks = ranks or DataRanks(group, ds_comm.get_world_size(group), ds_comm.get_rank(group))
        self.client_optimizer = client_optimizer
        self.client_lr_scheduler: Any = None
        self._choose_device(device_index)
        self.module = model.to(self.device) if self.device.type != "cpu" else model
        self.global_steps = 0
        self.global_samples = 0
        self.micro_steps = 0
        self.skipped_steps = 0
        self.lr_scheduler: Any = None
        self.curriculum_scheduler_legacy = curriculum_of(config)
        self.training_dataloader: Any = None
        self.enable_backward_allreduce = True
        self._boundary: bool | None = None
        self._backward_pending = False
        self.compiled: CompiledModel | None = None
        self.kernels = fused_kernels(config, self.module)
        _, zero_optimizer = ds_zero.shard(
            self.module, optimizer, config=zero_config(config), group=group, **self._sharding()
        )
        sharded = ds_zero.sharded_of(self.module)
        assert sharded is not None  # shard() has just laid it out
        self.sharded = sharded
        self.recompute = recompute_plan(config, self.module, self._sharding().get("units"))
        self.pending_save: Any = None
        self.basic_optimizer = optimizer
        self.optimizer: Any = zero_optimizer
        if zero_optimizer is None and config.zero_optimization.stage >= 3:
            self.optimizer = self.sharded  # upstream gives its parameter-offload object here
        self.monitor = MonitorMaster(config)
        self.timers: Any = SynchronizedWallClockTimer() if config.wall_clock_breakdown else NoopTimer()
        self.callbacks = CallbackList([self.monitor, *progress_listeners(config, self.timers)])
        self.tput_timer = ThroughputTimer(
            config.timers.throughput,
            batch_size=config.train_batch_size,
            steps_per_output=config.steps_per_print,
            monitor_memory=config.memory_breakdown,
        )
        if config.dump_state:
            log_dist(config.explain(), ranks=[0])

    # -- being built ---------------------------------------------------------------------------------------------

    has_moe_layers = property(engine_has_moe_layers)

    def _choose_device(self, index: int | None) -> None:
        self.global_rank = ds_comm.get_rank()
        self.world_size = ds_comm.get_world_size()
        self.local_rank = ds_comm.get_local_rank()
        if ds_comm.device.device_type() != "cpu":
            ds_comm.device.set_device(self.local_rank if index is None else index)
        self.device = torch.device(ds_comm.device.current_device())
        self.dp_world_size, self.seq_dp_world_size = self._ranks.size, ds_comm.get_world_size(self.data_parallel_group)
        model_parallel = getattr(self.mpu, "get_model_parallel_world_size", None)
        self.mp_world_size = 1
        if model_parallel is not None and is_model_parallel(self.mpu):
            self.mp_world_size = int(model_parallel())

    def _sharding(self) -> dict[str, Any]:
        """Further arguments of `ds_zero.shard`."""
        return {"part": model_part(self.module)}

    @property
    def checkpoint_scope(self) -> checkpoint_io.Scope:
        """Which ranks save and load together, and what of the model lies where."""
        layout, tensor = {"pipe": 1, "data": self.seq_dp_world_size}, applied_to(self.module)
        return checkpoint_io.Scope(self.data_parallel_group, self.sharded.shard_map, layout, tensor=tensor)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the engine lacks are the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise

    @property
    def config(self) -> Any:
        """The user's own config dict."""
        return self._config.raw

    @property
    def communication_data_type(self) -> torch.dtype:
        """Dtype in which gradients travel."""
        return TORCH_DTYPES[self._config.communication_data_type]

    # -- forward, backward, step ---------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model; its output comes back unchanged."""
        self.timers(FORWARD).start()
        if self.training:
            self.tput_timer.start()
        if self._config.fp16.enabled and self._config.fp16.auto_cast:
            inputs, kwargs = half(inputs), half(kwargs)
        kwargs |= self.curriculum_arguments()
        try:
            with self._autocast():
                return self.module(*inputs, **kwargs)
        finally:
            self.timers(FORWARD).stop()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._config.torch_autocast.enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.torch_autocast_dtype())

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Back-propagate a scalar loss and reduce its gradients; returns the loss divided by the accumulation steps.

        Args:
            loss: scalar, as the model gave it.
            retain_graph: as torch's.
            scale_wrt_gas: False if the caller has divided the loss by the accumulation steps.
        Raises:
            ZeroStateError (RuntimeError): the loss is no scalar with a gradient function.
        """
        optimizer = self._training_optimizer("backward")
        self.timers(BACKWARD).start()
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        try:
            optimizer.backward(loss, retain_graph=retain_graph, accumulation=steps)
        finally:
            self.timers(BACKWARD).stop()
        self._backward_pending = True
        detached = loss.detach()
        self.callbacks.after_backward(self, detached)
        return detached / steps if steps > 1 else detached

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End a micro-step; at the boundary: clip, update, step the scheduler, count.

        Raises:
            ZeroStateError (RuntimeError): no backward since the last step, or inside `no_sync`.
        """
        optimizer = self._training_optimizer("step")
        boundary = self.is_gradient_accumulation_boundary()
        if not self._backward_pending and not optimizer.has_gradients():
            raise ds_zero.ZeroStateError(
                "engine.step() without engine.backward(loss) since the last step; call it first"
            )
        self._backward_pending = False
        if boundary:
            self.timers(STEP).start()
            optimizer.step()
            self.timers(STEP).stop()
            self._after_boundary(lr_kwargs)
        self.tput_timer.stop(global_step=boundary)
        self.micro_steps += 1

    def _after_boundary(self, lr_kwargs: dict[str, Any] | None) -> None:
        applied = self.was_step_applied()
        if not applied:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self.callbacks.after_step(self)

    def _training_optimizer(self, what: str) -> ds_zero.ZeroOptimizer:
        if not isinstance(self.optimizer, ds_zero.ZeroOptimizer):
            raise ds_zero.ZeroStateError(
                f"engine.{what}() needs an optimizer: pass one to deepspeed.initialize, or give the config an"
                ' "optimizer" section'
            )
        return self.optimizer

    def scale(self, loss: Tensor) -> Tensor:
        """The loss-scaled copy for a manual `.backward()`."""
        return self._training_optimizer("scale").scale(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that have not been stepped with."""
        if isinstance(self.optimizer, ds_zero.ZeroOptimizer):
            self.optimizer.zero_grad(set_to_none=set_to_none)
        else:
            super().zero_grad(set_to_none=set_to_none)

    # -- the boundary --------------------------------------------------------------------------------------------

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present micro-step ends a step (always, with `managed_gradient_accumulation: false`)."""
        if not self._config.managed_gradient_accumulation:
            return True
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide about the boundary yourself from now on (sticky)."""
        self._needs_managed_accumulation("set_gradient_accumulation_boundary")
        self._boundary = is_boundary

    def _needs_managed_accumulation(self, what: str) -> None:
        if not self._config.managed_gradient_accumulation:
            raise ds_zero.ZeroStateError(
                f"{what} with managed_gradient_accumulation: false, where every step() is the boundary; call step()"
                " when you want one, or set the key to true"
            )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep their gradients on this rank (4 bytes per parameter); legal at every stage."""
        with self._training_optimizer("no_sync").no_sync():
            yield

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Several backwards inside, one reduction at the end."""
        self._needs_managed_accumulation("coalesce_grad_reduction")
        optimizer = self._training_optimizer("coalesce_grad_reduction")
        with optimizer.no_sync():
            yield
        optimizer.reduce_kept()

    def was_step_applied(self) -> bool:
        """Whether the last boundary changed the weights."""
        return bool(getattr(self.optimizer, "step_applied", False))

    def get_global_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None before the first."""
        norm: float | None = getattr(self.optimizer, "grad_norm", None)
        return norm

    # -- numbers -------------------------------------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        """Learning rate of each param group."""
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """Momentum (SGD-like) or betas (Adam-like) of each param group."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def get_type(self) -> list[Any]:
        """Upstream's `type` entry of each param group, if any."""
        return [group.get("type") for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return list(getattr(self.optimizer, "param_groups", []))

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, micro-batch size per rank, accumulation steps)."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the batch by changing the accumulation steps; ValueError if it does not divide."""
        self._config = self._config.with_batch(train_batch_size=train_batch_size)
        self.tput_timer.batch_size = train_batch_size

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, the accumulation steps staying as they are."""
        self._config = self._config.with_batch(train_micro_batch_size_per_gpu=micro_batch_size)
        self.tput_timer.batch_size = self.train_batch_size()

    def get_data_parallel_rank(self) -> int:
        """Which of the batches that are read at the same time this rank reads."""
        return self._ranks.rank

    # -- data, listeners, compilation ----------------------------------------------------------------------------

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """A loader that gives each data-parallel rank its own samples; ValueError for what is no dataset."""
        if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
            raise ValueError(f"training_data is a {type(dataset).__name__}; expected a torch Dataset or any sequence")
        return DeepSpeedDataLoader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            pin_memory=pin_memory,
            local_rank=self.local_rank,
            tput_timer=self.tput_timer if route == "train" else None,
            collate_fn=collate_fn or self.collate_fn,
            num_local_io_workers=num_local_io_workers,
            data_sampler=data_sampler,
            data_parallel_world_size=self.dp_world_size,
            data_parallel_rank=self.get_data_parallel_rank(),
            dataloader_drop_last=self.dataloader_drop_last(),
        )

    def add_callback(self, callback: Callback) -> None:
        """Listen to training: see deepspeed.events.Callback."""
        self.callbacks.add(callback)

    def compile(
        self,
        backend: str | Callable[..., Any] | None = None,
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model's blocks in place with torch.compile (see `deepspeed.compilation`); again: anew.

        Args:
            backend: as torch.compile's; default: the accelerator's ("inductor").
            compile_kwargs: further arguments of torch.compile.
            schedule, compiled_autograd_enabled: of upstream's compiler passes; refused.
        Raises:
            DeepSpeedConfigError (ValueError): a refused argument, or an unknown backend.
        """
        previous, self.compiled = self.compiled, None
        if previous is not None:
            previous.close()
        self.compiled = compile_model(
            self.module,
            self._sharding().get("units"),
            gathers=self.zero_optimization_stage() >= 3,
            splits_backward=self.splits_backward,
            backend=backend,
            compile_kwargs=compile_kwargs,
            schedule=schedule,
            compiled_autograd_enabled=compiled_autograd_enabled,
        )

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self.compiled is not None

    def get_compile_time(self) -> float:
        """Seconds that this process has spent compiling since `compile`; 0.0 without it."""
        return 0.0 if self.compiled is None else self.compiled.seconds

    def register_compile_pass(self, name: str, opt_pass_fn: Callable[..., Any], contract: Any = None) -> None:
        """Refused: upstream's compiler passes do not exist here; a backend may change the graphs."""
        refuse_compile_pass(name)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | os.PathLike[str] | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that resuming needs to `save_dir/tag` (default tag: global_step<N>); collective.

        Returns when training may go on: what the next forward and backward could change is written, the optimizer's
        own memory is read while they run, and the next update waits for the rest of it. The checkpoint becomes
        durable, and `latest` moves, in the background. The next save, a load and exit wait for that and raise what
        went wrong with it; `wait_for_checkpoint` does so explicitly.
        """
        return checkpoint_io.save(self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def wait_for_checkpoint(self) -> None:
        """Return when the last save is durable; raises what went wrong with it."""
        checkpoint_io.wait(self)

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | os.PathLike[str] | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
        allow_pickle: bool | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint saved at any number of ranks and any stage; collective.

        Args:
            tag: which one; default: what `latest` names.
            load_module_strict: raise when names or state differ; otherwise what is common is loaded.
            custom_load_fn: called as `fn(src=<full state dict>, dst=<module>)` instead of loading the weights by name.
            allow_pickle: opt in to a checkpoint that upstream DeepSpeed 0.19 wrote (stages 1-3), which is pickled;
                default: only with DEEPSPEED_ALLOW_PICKLE=1 in the environment.
        Returns:
            (its path, the client state with `ds_version` and counters), or (None, None) without a `latest`.
        Raises:
            CheckpointError (OSError): damaged, of another model, or no such tag; on all ranks.
        """
        return checkpoint_io.load(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_states=load_lr_scheduler_states and not load_module_only,
            module_only=load_module_only,
            custom_load_fn=custom_load_fn,
            allow_pickle=allow_pickle,
        )

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model in its training dtype to one file (`.safetensors` by name, else torch.save)."""
        return checkpoint_io.save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's state dict (stage 3: placeholders; `_zero3_consolidated_16bit_state_dict` gathers)."""
        state: dict[str, Any] = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return checkpoint_io.without_frozen(self.module, state) if exclude_frozen_parameters else state

    def load_module_state_dict(
        self,
        checkpoint: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        """Load full tensors into the model and its masters; collective."""
        checkpoint_io.load_module(self, checkpoint.get("module", checkpoint), strict, custom_load_fn)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """Full CPU state dict on rank 0, None elsewhere; collective. ValueError unless stage 3."""
        if self.zero_optimization_stage() != 3:
            raise ValueError(
                f"the parameters are not sharded at stage {self.zero_optimization_stage()}; use state_dict()"
            )
        return checkpoint_io.consolidated_state_dict(self, exclude_frozen_parameters)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """Full CPU state dict on rank 0, None elsewhere, at any stage; collective."""
        return checkpoint_io.consolidated_state_dict(self, exclude_frozen_parameters)

    def destroy(self) -> None:
        """Remove hooks and give memory back; idempotent, called on every rank.

        Below stage 3 the model is an ordinary one afterwards; at stage 3 its parameters stay sharded.
        """
        checkpoint_io.wait(self)
        self.monitor.close()
        for change in (self.compiled, self.recompute):
            if change is not None:
                change.close()
        if isinstance(self.optimizer, ds_zero.ZeroOptimizer):
            self.optimizer.close()
        if self.zero_optimization_stage() < 3:
            self.sharded.close()
        self.sharded.detach()
        if self.kernels is not None:
            self.kernels.undo()
            self.kernels = None  # a second call finds nothing to undo
        if groups.mpu is self.mpu:
            groups.mpu = groups.mesh_device = None


def half(value: Any) -> Any:
    """Floating tensors in nested containers as fp16."""
    if isinstance(value, Tensor):
        return value.half() if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)((key, half(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(half(item) for item in value)
    return value
