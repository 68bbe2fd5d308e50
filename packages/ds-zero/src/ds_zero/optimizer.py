"""ZeroOptimizer: the one update path.

    reduce -> accumulate -> [boundary] unscale, global norm, clip -> optimizer on the flat shard -> publish parameters

Every stage, dtype and placement takes this path; the differences are in the units' layout. `step()` is the boundary:
it may be called after one backward or after many. A step whose gradients hold inf or NaN changes nothing: it is
skipped (16-bit models) or raises (fp32), naming the first parameter concerned.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero._inner import InnerOptimizer
from ds_zero._norm import first_nonfinite, global_norm
from ds_zero._reduce import GradientReducer
from ds_zero._unit import GradKind, Unit
from ds_zero.config import ZeroConfig
from ds_zero.errors import NonFiniteGradientError, ZeroStateError
from ds_zero.layout import ShardMap
from ds_zero.precision import DTYPES, LossScaler, dtype_name
from ds_zero.sharded import ShardedModel
from ds_zero.state import StateSegment, UpdateGate

__all__ = ["ZeroOptimizer"]

logger = logging.getLogger(__name__)


class ZeroOptimizer(Optimizer):
    """Wraps a torch optimizer over a `ShardedModel`. `param_groups` are the wrapped optimizer's own dicts.

    Attributes:
        optimizer: the wrapped optimizer; its params are flat fp32 masters now.
        overflow: whether the last boundary was skipped for inf or NaN.
        grad_norm: global L2 norm of the last boundary's mean gradient, before clipping; None before the first.
        step_applied: whether the last boundary changed the weights.
    """

    def __init__(self, optimizer: Optimizer, sharded: ShardedModel) -> None:
        self.sharded = sharded
        self.config: ZeroConfig = sharded.config
        self.comm = sharded.comm
        if sharded.hooks is not None:
            self.parameter_offload = sharded.parameter_offload  # clients take it from here, if it is there
        self.reducer = GradientReducer(
            sharded.lanes(),
            self.comm,
            self.config,
            shard_state=sharded.parts.state,
        )
        self.inner = InnerOptimizer(optimizer, sharded.trainable, self.config.sub_group_size)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        self.overflow = False
        self.grad_norm: float | None = None
        self.step_applied = False
        dtypes = {unit.layout.dtype for unit in sharded.trainable}
        if sharded.model_part is not None and self.config.dtype is not None:
            dtypes.add(dtype_name(DTYPES[self.config.dtype]))  # a part without parameters scales with the others
        fp16 = "float16" in dtypes
        self.scaler = LossScaler(self.config.loss_scaling, enabled=fp16)
        self._low_precision = bool(dtypes - {"float32"})
        self._sync = True
        self._loss_is_scaled = False
        self._gradients_arrived = False
        self._broken = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrival(unit, index))
            for unit in sharded.trainable
            for index, parameter in enumerate(unit.parameters)
        ]

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        return self.inner.optimizer

    @property
    def shard_map(self) -> ShardMap:
        return self.sharded.shard_map

    @property
    def gate(self) -> UpdateGate:
        """What a checkpoint closes while it reads masters and state; every method that writes them waits for it."""
        return self.sharded.gate

    @property
    def zero_stage(self) -> int:
        return self.config.stage

    @property
    def loss_scale(self) -> float:
        return self.scaler.scale

    # -- backward -----------------------------------------------------------------------------------------------

    def _arrival(self, unit: Unit, index: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if self.loss_scale != 1.0 and not self._loss_is_scaled and self.sharded.model_part is None:
                raise ZeroStateError(
                    f"backward() of an unscaled loss, but this fp16 model trains with loss scale {self.loss_scale:g};"
                    " call optimizer.backward(loss), or optimizer.scale(loss).backward()"
                )
            self._gradients_arrived = True
            if self._sync:
                self.reducer.arrived(unit, index)

        return arrived

    def backward(self, loss: Tensor, retain_graph: bool = False, accumulation: int | None = None) -> None:
        """Scale the loss, run autograd, and end the micro-batch (its reductions are complete on return).

        Args:
            loss: a scalar that requires a gradient, not divided by the accumulation steps.
            accumulation: what the boundary divides by instead of `gradient_accumulation_steps` (1 if the caller has
                divided the loss); must be the same for every micro-batch of a step.
        Raises:
            ZeroStateError: the loss is not a scalar or has no gradient function, or `accumulation` changes midway.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = (
                f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}"
                if isinstance(loss, Tensor)
                else type(loss)
            )
            raise ZeroStateError(
                f"backward needs a scalar loss with a gradient function, got {what}; reduce it, e.g. loss.mean()"
            )
        self.end_backward()
        divisor = self.config.gradient_accumulation_steps if accumulation is None else accumulation
        if self.reducer.micro_batches and divisor != self.reducer.divisor:
            raise ZeroStateError(
                f"this micro-batch divides by {divisor}, the {self.reducer.micro_batches} before it in the step by"
                f" {self.reducer.divisor}; use one value for all micro-batches of a step"
            )
        self.reducer.divisor = divisor
        self._broken = True
        self.scale(loss).backward(retain_graph=retain_graph)
        self._broken = False
        self.end_backward(force=True)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `.backward()` on by hand: multiplied by the loss scale."""
        self._loss_is_scaled = True
        return loss if self.loss_scale == 1.0 else loss.float() * self.loss_scale

    def end_backward(self, force: bool = False) -> None:
        """End a micro-batch whose backward ran outside `backward()`; the next forward and `step` do it as well.

        `force` counts a micro-batch even if no trainable parameter had a part in it on this rank.
        """
        if self._broken:
            raise ZeroStateError(
                "the last backward raised an error, so its gradients are incomplete; call zero_grad() to drop them"
            )
        if self._sync:
            self.reducer.flush(force=force)
        else:
            self.reducer.keep_local()
        if self._gradients_arrived:  # else a scaled loss may still be waiting for its backward
            self._loss_is_scaled = self._gradients_arrived = False
            self.sharded.end_micro_batch()  # not before: units may have been gathered ahead for the coming backward

    def reduce_kept(self) -> None:
        """Reduce now what `no_sync` kept (as one micro-batch), without waiting for another backward."""
        self.reducer.flush(force=True, kept=True)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep their gradients on this rank (4 bytes per element); the next outside reduces all."""
        if not self._sync:
            raise ZeroStateError("no_sync is entered inside no_sync; leave the outer one first")
        self.end_backward()
        self._sync = False
        try:
            yield
        finally:
            self.end_backward()
            self._sync = True

    # -- the boundary -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the accumulated mean gradient and forget it.

        Raises:
            ZeroStateError: no backward since the last step, or inside no_sync.
            NonFiniteGradientError: inf or NaN where skipping is not allowed; the weights are unchanged.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._sync:
            raise ZeroStateError("step inside no_sync; leave the context first, its gradients are not reduced")
        self.end_backward()
        if not self.reducer.micro_batches:
            raise ZeroStateError("step without a backward: no gradient has been reduced since the last step")
        self.sharded.refuse_unfrozen()
        self.reducer.finish_means()
        self.gate.wait()
        for unit in self.sharded.trainable:
            unit.absorb_edits()
        norm = _norm_of_model(self.sharded) / self.loss_scale
        self.grad_norm = norm
        check = self.config.check_nonfinite or self.scaler.enabled  # a loss scale cannot do without
        self.overflow = check and not math.isfinite(norm)
        self.step_applied = not self.overflow
        if self.overflow:
            self._skip()
        else:
            bucket = self.config.allgather_bucket_size
            self.inner.step(self._coefficient(norm), publish=lambda unit: unit.publish(bucket))
            self.scaler.update(overflow=False)
        self.reducer.clear()
        return loss

    def _coefficient(self, norm: float) -> float:
        """The one factor between the mean gradient and what the optimizer sees: unscale and clip."""
        limit = self.config.gradient_clipping
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        return clip / self.loss_scale

    def _skip(self) -> None:
        """A boundary with inf or NaN: nothing changes; say what and where."""
        part = self.sharded.model_part
        culprit = first_nonfinite(self.sharded.trainable, self.comm, None if part is None else part.comm)
        skip = self.config.skip_nonfinite
        if skip is None:
            skip = self._low_precision
        if not skip:
            self.reducer.clear()
            raise NonFiniteGradientError(
                f"the gradient of {culprit} holds inf or NaN (global norm {self.grad_norm}); the weights are unchanged."
                " Check the batch and the learning rate, or set skip_nonfinite to drop such steps"
            )
        scale = self.loss_scale
        try:
            self.scaler.update(overflow=True, culprit=culprit)
        finally:
            self.reducer.clear()
        if self.comm.rank == 0:
            then = f"; loss scale {scale:g} -> {self.loss_scale:g}" if self.scaler.dynamic else ""
            logger.warning("step skipped: the gradient of %s holds inf or NaN%s", culprit, then)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that have not been stepped with (collective if a backward has not been ended)."""
        self.reducer.clear()
        if self._broken:
            self._broken = self._loss_is_scaled = self._gradients_arrived = False
            self.sharded.end_micro_batch()
        for unit in self.sharded.trainable:
            for parameter in unit.parameters:
                parameter.grad = None

    def has_gradients(self) -> bool:
        """Whether any unit holds a gradient, or has one on its way."""
        return self._gradients_arrived or any(
            unit.grad_kind is not GradKind.EMPTY or unit.local is not None for unit in self.sharded.trainable
        )

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Take the parameters' present values over into the masters (after edits through `.data`)."""
        self.gate.wait()
        for unit in self.sharded.trainable:
            if unit.master is not None and unit.master is not unit.storage.own:
                unit.master.copy_(unit.storage.own)

    # -- state --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export_state(self) -> list[StateSegment]:
        """What this rank saves: over all ranks every element once. Tensors alias the live state."""
        self.gate.wait()
        for unit in self.sharded.trainable:
            unit.absorb_edits()
        return [*self.inner.state_segments(shard_only=True), *self.sharded.parameter_segments()]

    def import_targets(self, keys: dict[str, torch.dtype] | None = None) -> list[StateSegment]:
        """Writable segments of everything this rank needs; `keys` are optimizer states to allocate (name -> dtype)."""
        self.gate.wait()
        self.inner.allocate_all(keys or {})
        return [*self.inner.state_segments(shard_only=False), *self.sharded.parameter_segments(shard_only=False)]

    @torch.no_grad()
    def finish_import(self, targets: Sequence[StateSegment] = ()) -> None:
        """Publish what was loaded into the masters, and take the segments' scalars over (collective)."""
        self.gate.wait()
        for segment, target in zip(self.inner.segments, targets, strict=False):
            state = self.optimizer.state[segment.parameter]
            for key, value in target.scalars.items():  # torch's optimizers keep them as 0-d tensors, some as numbers
                kind = type(state.get(key))
                state[key] = kind(value) if kind in (int, float) else torch.tensor(float(value), dtype=torch.float32)
        for segment in self.inner.segments:
            unit = segment.unit
            if unit.master is not None and unit.master is not unit.storage.own:
                segment.of(unit.storage.own).copy_(segment.parameter.data)
        self.sharded.settle()
        self.reducer.clear()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state (masters, optimizer state, scaler); checkpoints use `export_state` instead."""
        self.gate.wait()
        return {
            "zero_stage": self.zero_stage,
            "loss_scaler": self.scaler.state_dict(),
            "overflow": self.overflow,
            "partition_count": self.shard_map.state_shards,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_flat_groups": [segment.parameter.data for segment in self.inner.segments],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict()` of the same rank at the same layout."""
        flats = state_dict["fp32_flat_groups"]
        if len(flats) != len(self.inner.segments):
            raise ZeroStateError(
                f"state of {len(flats)} segments does not fit this rank's {len(self.inner.segments)}; it was taken at"
                " another layout: use a checkpoint, which loads at any"
            )
        self.gate.wait()
        self.optimizer.load_state_dict(state_dict["optimizer_state_dict"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state  # torch replaced both
        for segment, flat in zip(self.inner.segments, flats, strict=True):
            segment.parameter.data.copy_(flat)
        self.scaler.load_state_dict(state_dict["loss_scaler"])
        self.finish_import()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while being built; a sharded model's groups are fixed."""
        if hasattr(self, "scaler"):
            raise ZeroStateError(
                "add_param_group after sharding: the units are laid out; add the group before ds_zero.shard"
            )
        super().add_param_group(param_group)

    def close(self) -> None:
        """Remove hooks and windows (collective); the model is closed separately."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.reducer.close()


def _norm_of_model(sharded: ShardedModel) -> float:
    """Of the mean gradient times loss scale, over all ranks and all parts of the model."""
    part, by_state = sharded.model_part, sharded.parts.state
    if part is None:
        return global_norm(sharded.trainable, sharded.comm, sharded=by_state)
    names = sharded.duplicate_names
    return global_norm(sharded.trainable, sharded.comm, sharded=by_state, parts=part.comm, duplicates=names)


def trainable_parameters(groups: list[dict[str, Any]]) -> dict[nn.Parameter, int]:
    """Parameter -> index of its optimizer group."""
    return {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
