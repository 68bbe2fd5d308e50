"""ShardedModel: a model's units, hooks and shard map; what exists whether or not an optimizer does.

Built once by `shard()`. It owns the units (memory), the gather hooks (stage 3), and the place of every parameter;
the optimizer side (gradients, update) is `ZeroOptimizer`. Nothing here is process-wide: several live side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ds_comm import Communicator
from ds_zero._flat import FlatMemory
from ds_zero._hooks import GatherHooks, refuse_copy
from ds_zero._param import adopt, mark_gathered, mark_released, record_of
from ds_zero._unit import Unit, UnitStatus
from ds_zero.blocks import Block
from ds_zero.config import ZeroConfig
from ds_zero.errors import LayoutError, ZeroStateError
from ds_zero.handover import ParameterOffload
from ds_zero.part import ModelPart
from ds_zero.planning import StageParts, parameter_names, plan_units
from ds_zero.state import PARAM, StateSegment, UpdateGate

__all__ = ["Place", "ShardedModel", "StageParts", "UnitHome", "merge_owners", "place_of"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter of a sharded model lives."""

    owner: ShardedModel
    unit: Unit
    index: int


def place_of(parameter: Tensor) -> Place | None:
    """The place of a parameter that `shard()` laid out; None for any other tensor."""
    return parameter.__dict__.get("_zero_place") if isinstance(parameter, nn.Parameter) else None


class UnitHome:
    """Home of a stage-3 parameter: one slot of a unit."""

    def __init__(self, unit: Unit, index: int, gate: UpdateGate) -> None:
        self.unit = unit
        self.index = index
        self.comm = unit.comm
        self._gate = gate

    @property
    def available(self) -> bool:
        return self.unit.status is UnitStatus.GATHERED

    @property
    def shard(self) -> Tensor:
        unit, slot = self.unit, self.unit.layout.slots[self.index]
        start, stop = unit.layout.shard_range(unit.comm.rank)
        low, high = max(start, slot.offset), max(min(stop, slot.stop), max(start, slot.offset))
        return unit.storage.shard[low - start : high - start] if low < high else unit.storage.shard[:0]

    def fetch(self) -> Tensor:
        return self.unit.fetch(self.index)

    def store(self, value: Tensor) -> None:
        self._gate.wait()
        self.unit.store(self.index, value)

    def hold(self, held: bool) -> None:
        (self.unit.held.add if held else self.unit.held.discard)(self.index)

    def restore(self, parameter: nn.Parameter) -> None:
        if self.available:
            mark_gathered(parameter)
            parameter.data = self.unit.view(self.unit.layout.slots[self.index])
        else:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            mark_released(parameter)


class SpentHome:
    """Home of a parameter on its way from zero.Init's slice, freed already, into its unit."""

    available = False

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.shard = torch.empty(0)

    def fetch(self) -> Tensor:
        raise ZeroStateError("this parameter was lost when shard() failed; build the model anew")

    def store(self, value: Tensor) -> None:
        self.fetch()

    def hold(self, held: bool) -> None:
        return None

    def restore(self, parameter: nn.Parameter) -> None:
        return None


class _RootHook:
    """The forward hook of a model whose parameters are whole; in a copy of the model it does nothing."""

    def __init__(self, begin_forward: Callable[[], None] | None) -> None:
        self._begin_forward = begin_forward

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._begin_forward is not None:
            self._begin_forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> _RootHook:
        return _RootHook(None)


class ShardedModel:
    """Units and hooks of one model. See `shard()` for the arguments' meaning."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        groups: dict[nn.Parameter, int],
        config: ZeroConfig,
        parts: StageParts,
        comm: Communicator,
        begin_forward: Callable[[], None],
        model_part: ModelPart | None = None,
    ) -> None:
        self.module = model
        self.model_part = model_part
        self.config = config
        self.comm = comm
        self.parts = parts
        self.gate = UpdateGate()
        self._names = parameter_names(model)
        _refuse_shared_memory(self._names)
        by_name = {names[0]: parameter for parameter, names in self._names.items()}
        self.shard_map = plan_units(blocks, self._names, groups, config, parts, comm.size, model_part)
        comm.agree(self.shard_map.fingerprint(), label="shard map (every rank must build the same model and optimizer)")
        self._equalise(model)
        self.units: list[Unit] = []
        masters = self._master_memory() if groups else None
        for layout in self.shard_map.units:
            parameters = [by_name[slot.name] for slot in layout.slots]
            self.units.append(self._build(Unit, layout, parameters, masters))
        self.trainable = [unit for unit in self.units if unit.layout.trainable]
        unit_of = {p: unit for unit in self.units for p in unit.parameters}
        self._begin_forward = begin_forward
        self.hooks: GatherHooks | None = None
        self._root_hook: Any = None
        if parts.params:
            sharded = {p: unit for p, unit in unit_of.items() if unit.sharded}
            owners = [
                (owner, list(dict.fromkeys(sharded[p] for p in block.parameters if p in sharded)))
                for block in blocks
                for owner in block.owners
            ]
            self.hooks = GatherHooks(model, merge_owners(owners), sharded, config, begin_forward)
            self._adopt()
        else:
            self._root_hook = model.register_forward_pre_hook(_RootHook(begin_forward), prepend=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: a copy of the model is an ordinary one. ZeroStateError at stage 3, where it would be empty."""
        if self.parts.params:
            refuse_copy(type(self.module).__name__)
        memo[id(self.module.__dict__.get("_zero_optimizer"))] = None

    @property
    def duplicate_names(self) -> frozenset[str]:
        """Names of the parameters that another part of the model counts and saves."""
        duplicates = () if self.model_part is None else self.model_part.duplicates
        return frozenset(self._names[parameter][0] for parameter in duplicates)

    def lanes(self) -> list[list[Unit]]:
        """The trainable units of each lane (`ModelPart`); one lane of all where there is no part."""
        part = self.model_part
        found: list[list[Unit]] = [[] for _ in range(max(1, len(part.lanes) if part else 1))]
        for unit in self.trainable:
            found[part.lane_of(unit.parameters[0]) if part else 0].append(unit)
        return found

    def _equalise(self, model: nn.Module) -> None:
        """Give every rank rank 0's initial values, unless all ranks hold the same already (a hash tells)."""
        tensors = [p.data for p in self._names if record_of(p) is None]
        tensors += [b for b in model.buffers() if b.device.type != "meta"]
        if self.comm.size == 1 or not tensors:
            return
        digest = xxhash.xxh3_64()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        mine = torch.tensor([digest.intdigest() >> 2], dtype=torch.int64, device=tensors[0].device)
        first = mine.clone()
        self.comm.broadcast(first, 0, label="hash of the initial values")
        differs = (mine != first).to(torch.int64)
        self.comm.all_reduce(differs, label="initial values that differ")
        if int(differs):
            for tensor in tensors:
                whole = tensor.contiguous()
                self.comm.broadcast(whole, 0, label="initial values")
                tensor.copy_(whole)

    def _master_memory(self) -> FlatMemory:
        """Memory for this rank's masters; fp32 parameters are their own."""
        updated = [layout for layout in self.shard_map.units if layout.trainable and layout.dtype != "float32"]
        ranges = [self.shard_map.state_range(layout, self.comm.rank) for layout in updated]
        return FlatMemory(stop - start for start, stop in ranges)

    def _build(self, kind: type[Unit], layout: Any, parameters: list[nn.Parameter], masters: FlatMemory | None) -> Unit:
        """Make a unit and move the parameters' values into it, one parameter at a time."""
        unit = kind(layout, parameters, self.comm, self.shard_map, shard_params=self.parts.params)

        def value_of(index: int) -> Tensor:
            parameter = parameters[index]
            record = record_of(parameter)
            if record is None:
                value = parameter.data
            else:
                value = record.home.fetch()
                record.home = SpentHome(self.comm)
            parameter.data = torch.empty(0, dtype=unit.storage.full.dtype, device=unit.device)
            return value

        for parameter in parameters:
            parameter.grad = None
        unit.load(value_of, masters=masters if layout.trainable else None)
        if not self.parts.params:
            for parameter in parameters:  # zero.Init was used, but this stage keeps whole parameters
                if record_of(parameter) is not None:
                    del parameter.__dict__["_zero_record"]
                    parameter.__class__ = nn.Parameter
        if unit.sharded:
            unit.detach()
        else:
            unit.attach()
        return unit

    def _adopt(self) -> None:
        for unit in self.units:
            for index, (slot, parameter) in enumerate(zip(unit.layout.slots, unit.parameters, strict=True)):
                home = UnitHome(unit, index, self.gate)
                record = adopt(parameter, torch.Size(slot.shape), home)
                record.register_external = self._external
                home.restore(parameter)
        for module in self.module.modules():
            for parameter in module.__dict__.get("_zero_external", {}):
                self._external(module, parameter, True)

    def _external(self, module: nn.Module, parameter: nn.Parameter, add: bool) -> None:
        place = place_of(parameter)
        if self.hooks is None or (place is not None and not place.unit.sharded):
            return
        (self.hooks.register_external if add else self.hooks.unregister_external)(module, parameter)

    def set_places(self) -> None:
        """Let each parameter know its place (for the safe_* accessors)."""
        for unit in self.units:
            for index, parameter in enumerate(unit.parameters):
                parameter.__dict__["_zero_place"] = Place(self, unit, index)

    def refuse_unfrozen(self) -> None:
        """Raise if a parameter was unfrozen after sharding: it has no master and no state, so it would never train."""
        for unit in self.units:
            if unit.master is None:
                for slot, parameter in zip(unit.layout.slots, unit.parameters, strict=True):
                    if parameter.requires_grad:
                        raise ZeroStateError(
                            f"parameter {slot.name!r} requires a gradient, but was frozen (or in no optimizer group)"
                            " when the model was sharded; unfreeze it before, or freeze it again"
                        )

    def end_micro_batch(self) -> None:
        """Release what a backward left gathered."""
        if self.hooks is not None:
            self.hooks.end_micro_batch()

    def gather(self) -> None:
        """Have every parameter whole on this rank until `release`: forwards in between communicate nothing.

        One gather of each sharded unit; nothing if it is so already. Collective where gathering copies (all but shared
        memory), and after a backward that nothing has ended yet.
        """
        self._begin_forward()
        works = []
        for unit in self.units:
            if unit.sharded and not unit.pinned:
                unit.pinned = True
                works.append(unit.gather(async_op=True))
        for work in works:
            if work is not None:
                work.wait()

    def release(self) -> None:
        """Undo `gather`: units are there only while they are used, as before. Local; twice is no error."""
        for unit in self.units:
            if unit.pinned:
                unit.pinned = False
                unit.release()

    @functools.cached_property
    def parameter_offload(self) -> ParameterOffload:
        """What clients of upstream switch gathering off with; AttributeError where no parameter is sharded."""
        if self.hooks is None:
            raise AttributeError("parameter_offload: parameters are sharded at stage 3 only")
        return ParameterOffload(self.module, self.gather, self.release)

    def owns_hook(self, hook: Any) -> bool:
        """Whether a module's forward hook is one of those that gather and release; it changes no result."""
        return self.hooks is not None and getattr(hook, "__self__", None) is self.hooks

    def parameter_segments(self, *, shard_only: bool = True) -> list[StateSegment]:
        """Parameters that no optimizer updates: the own elements (what a checkpoint saves), or all this rank holds."""
        segments = []
        for unit in self.units:
            if unit.master is not None:
                continue
            whole = not shard_only and not unit.sharded
            start, stop = (0, unit.layout.padded_numel) if whole else unit.layout.shard_range(self.comm.rank)
            memory = unit.storage.full if whole else unit.storage.shard
            for segment in unit.layout.segments(start, stop):
                tensors = {PARAM: memory[segment.offset : segment.offset + segment.numel]}
                segments.append(
                    StateSegment(unit.layout, segment.group, start + segment.offset, segment.numel, tensors, {})
                )
        return segments

    def settle(self) -> None:
        """Exchange what was written into the units' own ranges (after a load; collective)."""
        for unit in self.units:
            if unit.master is not None or unit.sharded:
                unit.publish(self.config.allgather_bucket_size)

    def detach(self) -> None:
        """Remove the hooks; parameters stay as they are. Local."""
        if self.hooks is not None:
            self.hooks.close()
            self.hooks = None
        if self._root_hook is not None:
            self._root_hook.remove()
            self._root_hook = None

    def close(self) -> None:
        """Undo the sharding: parameters become ordinary tensors with their full values (collective)."""
        self.gate.wait()
        self.detach()
        for unit in self.units:
            unit.gather()
            unit.close()
            for parameter in unit.parameters:
                parameter.__dict__.pop("_zero_place", None)
                if parameter.__dict__.pop("_zero_record", None) is not None:
                    parameter.__class__ = nn.Parameter
        self.units.clear()
        for key in ("_zero_sharded", "_zero_optimizer", "ds_external_parameters"):  # the model may be sharded again
            self.module.__dict__.pop(key, None)


def _refuse_shared_memory(names: dict[nn.Parameter, list[str]]) -> None:
    """Two Parameter objects over the same memory are no tie to torch (two gradients, two updates), and none to us."""
    seen: dict[tuple[torch.device, int], str] = {}
    for parameter, (name, *_) in names.items():
        if record_of(parameter) is not None or not parameter.numel() or parameter.device.type == "meta":
            continue
        other = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if other != name:
            raise LayoutError(
                f"parameters {other!r} and {name!r} are two Parameter objects over the same memory; tie them by giving"
                " both modules the same Parameter"
            )


def merge_owners(owners: list[tuple[nn.Module, list[Unit]]]) -> list[tuple[nn.Module, list[Unit]]]:
    """One entry per owner, with all of its units."""
    merged: dict[int, tuple[nn.Module, list[Unit]]] = {}
    for owner, units in owners:
        entry = merged.setdefault(id(owner), (owner, []))
        entry[1].extend(unit for unit in units if unit not in entry[1])
    return [entry for entry in merged.values() if entry[1]]
