"""The wrapped torch optimizer, made to work on flat fp32 masters instead of the model's parameters.

Each (unit, optimizer group) pair that this rank holds is one *segment*: a contiguous 1-D fp32 Parameter that replaces
the group's parameters in `optimizer.param_groups` (the group dicts stay the user's own objects, so schedulers keep
working). Elementwise optimizers cannot tell the difference.

Three ways to step, one result per optimizer:
    fused    torch's fused Adam/AdamW kernel, driven in cache-sized chunks: cast gradient, update, cast parameter, in
             one pass over memory. Taken for torch.optim.Adam/AdamW unless `foreach=True` or `fused=False` was asked
             for (`fused=None` leaves the choice to us), and for classes that say `steps_as_torch_adam = True`.
    generic  any other elementwise optimizer: `optimizer.step()` over segments, at most `sub_group_size` elements at a
             time, so that their fp32 gradients exist only briefly.
    pieces   an optimizer that asks for it (`pieces.PiecewiseOptimizer`): unit by unit, each parameter for itself.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, AdamW, Optimizer

import ds_comm.kernels
from ds_zero._flat import FlatMemory, trim_heap
from ds_zero._pieces import UnitBatch
from ds_zero._unit import Unit
from ds_zero.errors import LayoutError
from ds_zero.pieces import OptimizerPiece, OptimizerSlot, PiecewiseOptimizer
from ds_zero.state import MASTER, StateSegment

__all__ = ["InnerOptimizer", "MasterSegment"]

CHUNK_NUMEL = 1 << 17
"""Elements per fused chunk: master, two moments and the gradient in fp32 are 2 MiB, inside one core's cache."""


@dataclasses.dataclass(eq=False)
class MasterSegment:
    """Elements `[offset, offset + numel)` of the unit's own range, all of one optimizer group."""

    unit: Unit
    group: int
    offset: int
    numel: int
    parameter: nn.Parameter

    def of(self, flat: Tensor) -> Tensor:
        """This segment of a tensor laid out like the own range."""
        return flat[self.offset : self.offset + self.numel]


def _segments(units: Sequence[Unit]) -> Iterator[MasterSegment]:
    for unit in units:
        if unit.master is None:
            continue
        for segment in unit.layout.segments(unit.start, unit.stop):
            data = unit.master[segment.offset : segment.offset + segment.numel]
            yield MasterSegment(unit, segment.group, segment.offset, segment.numel, nn.Parameter(data))


class InnerOptimizer:
    """Owns the segments and steps the wrapped optimizer over them."""

    def __init__(self, optimizer: Optimizer, units: Sequence[Unit], sub_group_size: int) -> None:
        if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
            raise LayoutError(
                f"{type(optimizer).__name__} already holds state of {len(optimizer.state)} parameters; shard the model"
                " before the first step, and load a checkpoint afterwards"
            )
        self.optimizer = optimizer
        self.sub_group_size = sub_group_size
        self._units = list(units)
        self.segments = list(_segments(units))
        self._keys = {
            parameter: key
            for key, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }
        for index, group in enumerate(optimizer.param_groups):
            group["params"] = [segment.parameter for segment in self.segments if segment.group == index]
        optimizer.state.clear()
        if isinstance(optimizer, Adagrad):  # the one torch optimizer that makes its state when it is built
            for segment in self.segments:
                initial = self.group_of(segment)["initial_accumulator_value"]
                optimizer.state[segment.parameter] = {
                    "step": torch.tensor(0.0),
                    "sum": torch.full_like(segment.parameter, initial),
                }
        self._scratch = torch.empty(0)
        self._moments: dict[str, FlatMemory] = {}
        self._settled = False

    def group_of(self, segment: MasterSegment) -> dict[str, Any]:
        """The (user's own) param group dict of a segment."""
        return self.optimizer.param_groups[segment.group]

    @property
    def fused(self) -> bool:
        """Whether torch's fused Adam kernel drives the update."""
        cls = type(self.optimizer)
        return (cls in (Adam, AdamW) or getattr(cls, "steps_as_torch_adam", False)) and all(
            group.get("fused") is not False
            and not group.get("foreach")
            and not group.get("differentiable")
            and group.get("bias_correction", True)
            for group in self.optimizer.param_groups
        )

    def step(self, coefficient: float, publish: Callable[[Unit], None]) -> None:
        """Update every master from `coefficient * unit.grad`, cast it into the unit's own parameters, publish the unit.

        The fused way publishes each unit right after its update, while its parameters are in the cache.
        """
        if self.fused:
            segments = collections.deque(self.segments)
            for unit in self._units:
                while segments and segments[0].unit is unit:
                    self._fused_step(segments.popleft(), coefficient)
                publish(unit)
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look for
        elif isinstance(self.optimizer, PiecewiseOptimizer):
            self.optimizer.step_pieces(self._batches(self.optimizer, coefficient, publish))
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            for tile in self._tiles():
                self._generic_step(tile, coefficient)
            for unit in self._units:
                publish(unit)
        if not self._settled:
            self._settle()

    def _settle(self) -> None:
        """After the first step everything that stays exists: give back what only its making needed."""
        self._settled = True
        if any(unit.device.type == "cpu" for unit in self._units):
            trim_heap()
            ds_comm.kernels.forget_compiler()

    # -- fused ---------------------------------------------------------------------------------------------------

    def allocate(self, segment: MasterSegment) -> None:
        """Create the Adam state of a segment as torch.optim.Adam would on its first step."""
        state = self.optimizer.state[segment.parameter]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.group_of(segment)["amsgrad"]
        for key in keys:
            if key not in self._moments:
                self._moments[key] = FlatMemory(other.numel for other in self.segments)
            state[key] = self._moments[key].take(segment.numel, torch.float32, segment.parameter.device).zero_()

    def _fused_step(self, segment: MasterSegment, coefficient: float) -> None:
        self.allocate(segment)
        group = self.group_of(segment)
        state = self.optimizer.state[segment.parameter]
        state["step"] += 1
        kernel = torch._fused_adamw_ if self._decoupled(group) else torch._fused_adam_
        unit = segment.unit
        master, out = segment.parameter.data, segment.of(unit.storage.own)
        device_type = master.device.type
        step = state["step"] if device_type == "cpu" else state["step"].to(master.device)
        chunk = CHUNK_NUMEL * torch.get_num_threads() if device_type == "cpu" else segment.numel
        beta1, beta2 = group["betas"]
        for offset, grad in unit.grad_parts(segment.offset, segment.numel):
            for start in range(0, grad.numel(), chunk):
                stop = min(start + chunk, grad.numel())
                part = slice(offset + start, offset + stop)
                kernel(
                    [master[part]],
                    [self._scaled(grad[start:stop], coefficient)],
                    [state["exp_avg"][part]],
                    [state["exp_avg_sq"][part]],
                    [state["max_exp_avg_sq"][part]] if group["amsgrad"] else [],
                    [step],
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=group["amsgrad"],
                    maximize=group["maximize"],
                )
                if unit.master is not unit.storage.own:
                    out[part].copy_(master[part])

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", isinstance(self.optimizer, AdamW)))

    def _scaled(self, grad: Tensor, coefficient: float) -> Tensor:
        """`coefficient * grad` in fp32; scratch memory except where the gradient can be used as it lies."""
        if grad.dtype == torch.float32 and coefficient == 1.0:
            return grad
        if self._scratch.numel() < grad.numel() or self._scratch.device != grad.device:
            self._scratch = torch.empty(grad.numel(), dtype=torch.float32, device=grad.device)
        scaled = self._scratch[: grad.numel()].copy_(grad)
        return scaled if coefficient == 1.0 else scaled.mul_(coefficient)

    # -- pieces --------------------------------------------------------------------------------------------------

    def _batches(
        self, optimizer: PiecewiseOptimizer, coefficient: float, publish: Callable[[Unit], None]
    ) -> Iterator[UnitBatch]:
        """Every unit as a batch; it is published when the optimizer asks for the next."""
        segments = collections.deque(self.segments)
        for unit in self._units:
            pieces: list[OptimizerPiece] = []
            while segments and segments[0].unit is unit:
                pieces += self._pieces(optimizer, segments.popleft())
            slots = tuple(
                OptimizerSlot(self._keys[parameter], slot.name, slot.shape, self.optimizer.param_groups[slot.group])
                for slot, parameter in zip(unit.layout.slots, unit.parameters, strict=True)
            )
            yield UnitBatch(unit, slots, tuple(pieces), coefficient)
            publish(unit)

    def _pieces(self, optimizer: PiecewiseOptimizer, segment: MasterSegment) -> Iterator[OptimizerPiece]:
        unit, shape = segment.unit, segment.parameter.shape
        state = optimizer.begin_step(segment.parameter, self.group_of(segment))
        numbers = {slot.name: index for index, slot in enumerate(unit.layout.slots)}
        own = None if unit.master is unit.storage.own else unit.storage.own
        for piece in unit.layout.pieces(unit.start, unit.stop):
            if piece.slot.group != segment.group:
                continue
            low = piece.offset - segment.offset
            part = slice(low, low + piece.numel)
            cut = {k: v[part] if isinstance(v, Tensor) and v.shape == shape else v for k, v in state.items()}
            out = None if own is None else own[piece.offset : piece.offset + piece.numel]
            master, grad = segment.parameter.data[part], unit.grad_of(piece)
            yield OptimizerPiece(numbers[piece.slot.name], piece.start, master, grad, out, cut)

    # -- state ---------------------------------------------------------------------------------------------------

    def allocate_all(self, keys: dict[str, torch.dtype]) -> None:
        """Create the state of every segment that a load will fill: what Adam has, and the named tensors."""
        for segment in self.segments:
            if isinstance(self.optimizer, PiecewiseOptimizer):  # it knows better than what is stored
                self.optimizer.allocate(segment.parameter, self.group_of(segment))
                continue
            if self.fused:
                self.allocate(segment)
            for key, dtype in keys.items():
                state = self.optimizer.state[segment.parameter]
                if key not in state:
                    state[key] = torch.zeros_like(segment.parameter, dtype=dtype)

    def state_segments(self, *, shard_only: bool) -> list[StateSegment]:
        """Masters and optimizer state as checkpoints see them: of the own shard, or of all that this rank holds."""
        found = []
        for segment in self.segments:
            unit = segment.unit
            first = unit.start + segment.offset
            start, stop = first, first + segment.numel
            if shard_only:
                low, high = unit.layout.shard_range(unit.comm.rank)
                start, stop = max(start, low), min(stop, high)
            if start >= stop:
                continue
            part = slice(start - first, stop - first)
            tensors = {MASTER: segment.parameter.data[part]}
            private = set() if unit.master is unit.storage.own else {MASTER}
            scalars = {}
            for key, value in self.optimizer.state.get(segment.parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == segment.parameter.shape:
                    tensors[key] = value[part]
                    private.add(key)
                elif isinstance(value, (Tensor, int, float)):
                    scalars[key] = float(value)
            numel, kept = stop - start, frozenset(private)
            found.append(StateSegment(unit.layout, segment.group, start, numel, tensors, scalars, kept))
        return found

    # -- generic -------------------------------------------------------------------------------------------------

    def _tiles(self) -> Iterator[list[MasterSegment]]:
        tile: list[MasterSegment] = []
        for segment in self.segments:
            if tile and sum(s.numel for s in tile) + segment.numel > self.sub_group_size:
                yield tile
                tile = []
            tile.append(segment)
        if tile:
            yield tile

    def _generic_step(self, tile: list[MasterSegment], coefficient: float) -> None:
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        for segment in tile:
            assert segment.unit.grad is not None
            grad = segment.of(segment.unit.grad).to(torch.float32, copy=True)
            segment.parameter.grad = grad if coefficient == 1.0 else grad.mul_(coefficient)
        try:
            for index, group in enumerate(groups):
                group["params"] = [segment.parameter for segment in tile if segment.group == index]
            self.optimizer.step()
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params
            for segment in tile:
                segment.parameter.grad = None
        for segment in tile:
            unit = segment.unit
            if unit.master is not unit.storage.own:
                segment.of(unit.storage.own).copy_(segment.parameter.data)
