"""What a training step will hold and send, from a run on fake tensors: no ranks, no memory, no arithmetic.

The model runs forward and backward once on tensors that have shapes and no content, under the same gather hooks as a
real run, so that gathers, releases and reductions come in the order in which the runtime makes them. Every storage that
the run creates is followed from birth to death, which gives the activations exactly as autograd keeps them.

Vocabulary: an *owner* is what a byte is held for (`OWNERS`); the *peak* is the moment at which all owners together hold
most; `kind` is the transport as ds_comm names it ("local", "shm", "gloo", "torch"). In shared memory ("shm") gathering
moves nothing: a byte that several ranks see is counted with the rank that owns it.

Not seen: what a kernel allocates inside itself, the allocator's own losses, the process (interpreter, libraries).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_zero._hooks import GatherHooks
from ds_zero._unit import UnitStatus
from ds_zero.blocks import Block, UnitSpec, find_blocks
from ds_zero.buckets import bucket_limit, bucket_ranges, num_rows_of, window_nbytes
from ds_zero.config import ZeroConfig
from ds_zero.cost import ITEMSIZE, MASTER_NBYTES, memory_per_rank
from ds_zero.layout import ShardMap, UnitLayout
from ds_zero.planning import parameter_names, plan_units
from ds_zero.shard import stage_parts
from ds_zero.sharded import merge_owners

__all__ = ["OWNERS", "Forecast", "Moment", "Owner", "forecast"]

Owner = Literal[
    "parameters", "masters", "optimizer", "gradients", "waiting gradients", "units in flight", "activations", "buffers"
]
OWNERS: Mapping[Owner, str] = {
    "parameters": "what of the parameters stays on the rank",
    "masters": "fp32 copies of 16-bit parameters",
    "optimizer": "the optimizer's state",
    "gradients": "reduced gradients, kept until the step",
    "waiting gradients": "gradients that autograd has made and that are not reduced yet",
    "units in flight": "gathered parameters (stage 3)",
    "activations": "what forward keeps for backward, and what both make on the way",
    "buffers": "windows of communication, the model's buffers, scratch of the update",
}
"""Every owner of memory and what it is."""

Phase = Literal["forward", "backward", "step"]


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes of one rank at one time, by owner."""

    phase: Phase
    held: Mapping[Owner, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A training step of one rank, once a run is warm."""

    shard_map: ShardMap
    peak: Moment
    highest: Mapping[Phase, Moment]
    """The peak of each phase."""
    calls: Mapping[str, int]
    """Collectives per optimizer step, by op."""
    wire_elements: float
    """Elements sent per rank and step on a ring, the gradient norm included."""
    wire_nbytes: float
    kept: int
    """The peak of a process whose allocator keeps what was freed (glibc does, of tensors under 32 MiB): the highest sum
    of activations and waiting gradients, which use the same memory, and the highest of every other owner.
    """


_SHARED: tuple[Owner, ...] = ("activations", "waiting gradients")
"""Owners whose tensors come and go in the same memory."""


class _Memory:
    """Bytes by owner now, and the highest moment of each phase."""

    def __init__(self) -> None:
        self.now: collections.Counter[Owner] = collections.Counter()
        self.total = 0
        self.phase: Phase = "forward"
        self.highest: dict[Phase, Moment] = {}
        self._peaks: dict[Phase, int] = {}
        self._kept: collections.Counter[str] = collections.Counter()

    @property
    def kept(self) -> int:
        """Sum of the highest of each owner, those that use the same memory taken together."""
        return sum(self._kept.values())

    def add(self, owner: Owner, nbytes: int) -> None:
        """Hold so many bytes more (or fewer)."""
        self.now[owner] += nbytes
        self.total += nbytes
        if nbytes > 0:
            shared = owner in _SHARED
            held = sum(self.now[other] for other in _SHARED) if shared else self.now[owner]
            pool = "heap" if shared else owner
            self._kept[pool] = max(self._kept[pool], held)
        if self.total > self._peaks.get(self.phase, -1):
            self._peaks[self.phase] = self.total
            self.highest[self.phase] = Moment(self.phase, dict(self.now))

    def enter(self, phase: Phase) -> None:
        """A phase begins with what is held now."""
        self.phase = phase
        self.add("activations", 0)


class _Storages(TorchDispatchMode):
    """Follows every storage that is made while entered, from birth to death."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._known: dict[int, list[Any]] = {}  # address of the storage -> [owner, bytes, weak reference]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf, "activations")
        return result

    def see(self, tensor: Tensor, owner: Owner | None) -> None:
        """Count the storage of `tensor` for `owner` from now on, if it is new; with None it counts nothing."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        nbytes = storage.nbytes() if owner is not None else 0

        def gone(_: Any) -> None:
            found = self._known.pop(address, None)
            if found is not None and found[0] is not None:
                self._memory.add(found[0], -found[1])

        self._known[address] = [owner, nbytes, weakref.ref(storage, gone)]
        if owner is not None:
            self._memory.add(owner, nbytes)

    def move(self, tensor: Tensor, owner: Owner) -> None:
        """What was counted for one owner is another's now."""
        self.see(tensor, owner)
        found = self._known[tensor.untyped_storage()._cdata]
        if found[0] is not None and found[0] != owner:
            self._memory.now[found[0]] -= found[1]
            self._memory.now[owner] += found[1]
            found[0] = owner


class _Link:
    """Stands for the communicator of a unit."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Unit:
    """Stands for a `Unit` in the gather hooks: it has a size, and is gathered or not."""

    def __init__(self, layout: UnitLayout, kind: str, memory: _Memory, gathers: collections.Counter[int]) -> None:
        self.layout = layout
        self.comm = _Link(kind)
        self.storage = self
        self.status = UnitStatus.SHARDED
        self._nbytes = 0 if kind == "shm" else layout.padded_numel * ITEMSIZE[layout.dtype]
        self._memory = memory
        self._gathers = gathers

    @property
    def resident(self) -> bool:
        return self.status is UnitStatus.GATHERED

    def gather(self, async_op: bool = False) -> _Unit | None:
        """Hold the full parameters; counts one all-gather unless they are there."""
        if not self.resident:
            self.status = UnitStatus.GATHERED
            self._gathers[self.layout.index] += 1
            self._memory.add("units in flight", self._nbytes)
        return self if async_op else None

    def wait(self) -> None:
        """As a Work: a gather is over at once."""

    def release(self) -> None:
        """Give them back."""
        if self.resident:
            self.status = UnitStatus.SHARDED
            self._memory.add("units in flight", -self._nbytes)


class _Reductions:
    """Stands for the reducer: a unit's gradients wait until the last one is there, then they are one shard."""

    def __init__(self, shard_map: ShardMap, memory: _Memory, storages: _Storages, *, accumulates: bool) -> None:
        self._map = shard_map
        self._memory = memory
        self._storages = storages
        self._accumulates = accumulates
        self._waiting: dict[int, dict[int, nn.Parameter]] = {}
        self._reduced: set[int] = set()

    def arrived(self, layout: UnitLayout, slot: int, parameter: nn.Parameter) -> None:
        """Autograd has finished one gradient."""
        waiting = self._waiting.setdefault(layout.index, {})
        waiting[slot] = parameter
        if parameter.grad is not None:
            self._storages.move(parameter.grad, "waiting gradients")
        if len(waiting) == len(layout.slots):
            self._reduce(layout)

    def flush(self) -> None:
        """The micro-batch is over: what is incomplete is reduced as it is."""
        for unit in self._map.units:
            if unit.trainable and (unit.index in self._waiting or unit.index not in self._reduced):
                self._reduce(unit)

    def _reduce(self, layout: UnitLayout) -> None:
        waiting = self._waiting.pop(layout.index, {})
        loose = self._map.num_shards == 1 and not self._accumulates
        if layout.index not in self._reduced and not loose:
            start, stop = self._map.state_range(layout, 0)
            size = MASTER_NBYTES if self._accumulates else ITEMSIZE[layout.dtype]
            self._memory.add("gradients", size * (stop - start))
        self._reduced.add(layout.index)
        for parameter in waiting.values():
            if loose and parameter.grad is not None:
                self._storages.move(parameter.grad, "gradients")
            else:
                parameter.grad = None


def forecast(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    config: ZeroConfig,
    num_shards: int,
    kind: str = "torch",
    num_states: int | Mapping[int, int] = 2,
    scratch_nbytes: int = 0,
    groups: Mapping[nn.Parameter, int] | None = None,
    units: UnitSpec | None = None,
) -> Forecast:
    """Foresee one optimizer step of `model` on one of `num_shards` ranks. Leaves the model as it is.

    Args:
        model: any module, on any device, best on `meta`; its parameters give shapes, dtypes and ties only.
        run: forward of one micro-batch: gets the model with fake parameters, makes its inputs itself, returns the
            scalar loss. It must not look at values.
        kind: transport of the ranks. num_states: optimizer values per element (Adam 2), or of each group.
        scratch_nbytes: what the optimizer's update needs for itself.
        groups: parameter -> optimizer group; default: all that require a gradient, in one.
        units: as for `shard()`.
    Raises:
        LayoutError: as `shard()`.
    """
    parts = stage_parts(config.stage)
    names = parameter_names(model)
    if groups is None:
        groups = {p: 0 for p in names if p.requires_grad}
    blocks = find_blocks(model, units)
    shard_map = plan_units(blocks, names, groups, config, parts, num_shards)
    accumulates = config.gradient_accumulation_steps > 1
    fixed = memory_per_rank(shard_map, config.stage, num_states=num_states, accumulates=accumulates)
    limit = bucket_limit(kind, config.reduce_bucket_size)
    windows = 0 if num_shards == 1 else window_nbytes(shard_map, kind, limit, ITEMSIZE)
    memory = _Memory()
    memory.add("parameters", fixed.parameters)
    memory.add("masters", fixed.masters)
    memory.add("optimizer", fixed.optimizer)
    memory.add("buffers", windows + sum(b.numel() * b.element_size() for b in model.buffers()))
    gathers = _Rehearsal(model, names, blocks, shard_map, config, kind, memory).run(run)
    memory.enter("step")
    memory.add("buffers", scratch_nbytes)
    highest = memory.highest
    peak = max(highest.values(), key=lambda moment: moment.total)
    calls, elements, nbytes = _traffic(shard_map, config, gathers, limit)
    return Forecast(shard_map, peak, highest, calls, elements, nbytes, memory.kept)


class _Rehearsal:
    """One run of the model on fake tensors, with the hooks of a real one."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[nn.Parameter, list[str]],
        blocks: Sequence[Block],
        shard_map: ShardMap,
        config: ZeroConfig,
        kind: str,
        memory: _Memory,
    ) -> None:
        self._model = model
        self._names = names
        self._blocks = blocks
        self._map = shard_map
        self._config = config
        self._memory = memory
        self._gathers: collections.Counter[int] = collections.Counter()
        self._storages = _Storages(memory)
        self._slots = {slot.name: (unit, at) for unit in shard_map.units for at, slot in enumerate(unit.slots)}
        sharded = stage_parts(config.stage).params
        self._units = {
            unit.index: _Unit(unit, kind, memory, self._gathers)
            for unit in shard_map.units
            if sharded and not unit.persistent
        }

    def run(self, forward: Callable[[nn.Module], Tensor]) -> collections.Counter[int]:
        """Two micro-batches if gradients accumulate, else one; returns the gathers of the last, by unit."""
        accumulates = self._config.gradient_accumulation_steps > 1
        reductions = _Reductions(self._map, self._memory, self._storages, accumulates=accumulates)
        with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
            fakes = {parameter: self._fake(parameter, reductions) for parameter in self._names}
            stack.enter_context(_stand_ins(self._model, fakes))
            hooks = self._hooks(fakes)
            if hooks is not None:
                stack.callback(hooks.close)
            stack.enter_context(self._storages)
            for _ in range(1 + accumulates):
                self._gathers.clear()
                self._memory.enter("forward")
                loss = forward(self._model)
                self._memory.enter("backward")
                loss.backward()
                del loss
                reductions.flush()
                if hooks is not None:
                    hooks.end_micro_batch()
        return self._gathers

    def _fake(self, parameter: nn.Parameter, reductions: _Reductions) -> nn.Parameter:
        layout, at = self._slots[self._names[parameter][0]]
        slot = layout.slots[at]
        trained = layout.trainable
        fake = nn.Parameter(torch.empty(slot.shape, dtype=getattr(torch, layout.dtype)), requires_grad=trained)
        self._storages.see(fake, None)
        if trained:
            fake.register_post_accumulate_grad_hook(lambda p: reductions.arrived(layout, at, p))
        return fake

    def _hooks(self, fakes: Mapping[nn.Parameter, nn.Parameter]) -> GatherHooks | None:
        if not self._units:
            return None
        unit_of: dict[nn.Parameter, Any] = {}
        for parameter, fake in fakes.items():
            layout, _ = self._slots[self._names[parameter][0]]
            if layout.index in self._units:
                unit_of[fake] = self._units[layout.index]
        owners = [
            (owner, list(dict.fromkeys(unit_of[fakes[p]] for p in block.parameters if fakes[p] in unit_of)))
            for block in self._blocks
            for owner in block.owners
        ]
        return GatherHooks(self._model, merge_owners(owners), unit_of, self._config, lambda: None)


@contextlib.contextmanager
def _stand_ins(model: nn.Module, fakes: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Inside, the model has fake parameters, and fake copies of its buffers."""
    kept = [(module, module._parameters, module._buffers) for module in model.modules()]
    buffers = {b: torch.empty_like(b, device="cpu") for b in model.buffers()}
    try:
        for module, parameters, own in kept:
            module._parameters = {name: None if p is None else fakes[p] for name, p in parameters.items()}
            module._buffers = {name: None if b is None else buffers[b] for name, b in own.items()}
        yield
    finally:
        for module, parameters, own in kept:
            module._parameters, module._buffers = parameters, own


def _traffic(
    shard_map: ShardMap, config: ZeroConfig, gathers: Mapping[int, int], limit: int
) -> tuple[dict[str, int], float, float]:
    """Collectives, elements and bytes on the wire of one step; `gathers` are those of one micro-batch."""
    parts, size, micro = stage_parts(config.stage), shard_map.num_shards, config.gradient_accumulation_steps
    calls: collections.Counter[str] = collections.Counter()
    elements = nbytes = 0.0

    def send(op: str, unit: UnitLayout, times: int, messages: int = 1) -> None:
        nonlocal elements, nbytes
        sent = times * (2 if op == "all_reduce" else 1) * unit.shard_numel * (size - 1)
        calls[op] += times * messages
        elements += sent
        nbytes += sent * ITEMSIZE[unit.dtype]

    for unit in shard_map.units:
        sharded = parts.params and not unit.persistent
        if sharded:
            send("all_gather", unit, micro * gathers.get(unit.index, 0))
        if not unit.trainable:
            continue
        op = "reduce_scatter" if parts.state and config.reduce_scatter else "all_reduce"
        send(op, unit, micro, sum(1 for _ in bucket_ranges(unit, num_rows_of(shard_map, unit), limit)))
        if parts.state and not sharded:
            send("all_gather", unit, 1, -(-unit.shard_numel // max(config.allgather_bucket_size // size, 1)))
    if parts.state:  # the global norm, one fp64 number
        calls["all_reduce"] += 1
        elements += 2 * (size - 1) / size
        nbytes += 8 * 2 * (size - 1) / size
    return dict(calls), elements, nbytes
