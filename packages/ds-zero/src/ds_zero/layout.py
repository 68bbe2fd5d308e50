"""The shard map: where every element of every parameter lives. Pure data, no ranks, no torch.distributed.

Vocabulary
    slot     one parameter inside a unit: name, shape, offset in the unit's flat buffer, optimizer group.
    unit     parameters that are gathered and released together; one flat buffer, one dtype, one `trainable` flag.
             A module block that mixes dtypes or frozen and trainable parameters has several units.
    flat     the unit's 1-D concatenation of its slots, padded at the end to `num_shards * ALIGNMENT` elements.
    shard    the contiguous range `[rank * shard_numel, (rank + 1) * shard_numel)` of the flat that one rank owns.
    piece    the part of one slot that lies inside one range of the flat.
    segment  the part of one optimizer group that lies inside one range: slots are ordered by group, so a group is
             contiguous and a segment is what the optimizer sees as one tensor.

Invariants
    slots follow one another in order of (group, first appearance in the model), each at a multiple of ALIGNMENT: a
    kernel's rounding may depend on the alignment of its operands, so every parameter lies as torch would allocate it;
    gaps before slots and the tail after the last belong to no piece and hold zeros (a segment may span gaps);
    a tied parameter has one slot and its other names in `aliases`.
Everything else (runtime, checkpoint, norm, cost planner, tests) reads this object and never recomputes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

from ds_zero.errors import LayoutError

__all__ = [
    "ALIGNMENT",
    "FROZEN",
    "ParamSlot",
    "ParamSpec",
    "Piece",
    "Segment",
    "ShardMap",
    "UnitLayout",
    "plan_shard_map",
]

ALIGNMENT = 32
"""Elements; slots and shards begin at multiples of it (64 bytes of bf16, as torch aligns what it allocates)."""

FROZEN = -1
"""Optimizer group index of a parameter that no optimizer group holds or that does not require a gradient."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What the planner must know of one parameter before it is laid out."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    group: int = FROZEN
    aliases: tuple[str, ...] = ()
    lane: int = 0
    """Parameters of different lanes share no unit (their gradients arrive at different times)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class ParamSlot:
    """One parameter's place: elements `[offset, offset + numel)` of its unit's flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements `[start, stop)` of a parameter (flattened), at `offset` inside the range it was cut from."""

    slot: ParamSlot
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Segment:
    """Elements `[offset, offset + numel)` of a range that belong to one optimizer group."""

    group: int
    offset: int
    numel: int


@dataclasses.dataclass(frozen=True)
class UnitLayout:
    """One unit: its slots, and how its flat buffer is cut into `num_shards` equal shards."""

    name: str
    index: int
    slots: tuple[ParamSlot, ...]
    dtype: str
    trainable: bool
    num_shards: int
    persistent: bool = False
    """Stage 3 keeps a persistent unit gathered (small parameters)."""

    @functools.cached_property
    def numel(self) -> int:
        """Elements of the parameters, without gaps and tail."""
        return sum(slot.numel for slot in self.slots)

    @functools.cached_property
    def padded_numel(self) -> int:
        """Elements of the flat buffer."""
        return _round_up(max(self.slots[-1].stop, 1), self.num_shards * ALIGNMENT)

    @functools.cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges of the flat that no parameter covers, the tail included."""
        edges = [0, *(edge for slot in self.slots for edge in (slot.offset, slot.stop)), self.padded_numel]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    @property
    def shard_numel(self) -> int:
        return self.padded_numel // self.num_shards

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Elements of the flat that `rank` owns (padding included)."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Cut `[start, stop)` of the flat into pieces of parameters, in order."""
        for slot in self.slots:
            low, high = max(start, slot.offset), min(stop, slot.stop)
            if low < high:
                yield Piece(slot, low - slot.offset, high - slot.offset, low - start)

    def segments(self, start: int, stop: int) -> list[Segment]:
        """Cut `[start, stop)` (multiples of ALIGNMENT) of the flat into one contiguous segment per optimizer group.

        Segments end at a multiple of ALIGNMENT, over the gap behind their last piece: a vectorised optimizer treats
        a remainder in scalar code that rounds differently, so where an element lies would change its bits.
        """
        found: list[Segment] = []
        for piece in self.pieces(start, stop):
            first = found.pop().offset if found and found[-1].group == piece.slot.group else piece.offset
            found.append(Segment(piece.slot.group, first, _round_up(piece.offset + piece.numel, ALIGNMENT) - first))
        return found


@dataclasses.dataclass(frozen=True)
class ShardMap:
    """Every unit of a model. `state_shards` is 1 at stage 0 (each rank holds all of the state), else `num_shards`."""

    units: tuple[UnitLayout, ...]
    num_shards: int
    state_shards: int

    @property
    def numel(self) -> int:
        """Elements of all parameters, tied ones once, padding excluded."""
        return sum(unit.numel for unit in self.units)

    @property
    def padding_numel(self) -> int:
        return sum(unit.padded_numel - unit.numel for unit in self.units)

    def state_range(self, unit: UnitLayout, rank: int) -> tuple[int, int]:
        """Elements of the unit's flat whose master copy and optimizer state `rank` holds."""
        if self.state_shards == 1:
            return 0, unit.padded_numel
        return unit.shard_range(rank)

    def find(self, name: str) -> tuple[UnitLayout, ParamSlot]:
        """Unit and slot of a parameter by its name or by the name of a tie; LayoutError if there is none."""
        for unit in self.units:
            for slot in unit.slots:
                if name == slot.name or name in slot.aliases:
                    return unit, slot
        raise LayoutError(f"parameter {name!r} is not in the shard map of {len(self.units)} units; check its spelling")

    @staticmethod
    def joined(parts: Sequence[ShardMap]) -> ShardMap:
        """The map of a model from those of its parts, in order; a name that several parts have counts once."""
        units: list[UnitLayout] = []
        seen: set[str] = set()
        for part in parts:
            for unit in part.units:
                slots = tuple(slot for slot in unit.slots if slot.name not in seen)
                seen.update(slot.name for slot in slots)
                if slots:
                    units.append(dataclasses.replace(unit, index=len(units), slots=slots))
        return ShardMap(tuple(units), parts[0].num_shards, parts[0].state_shards)

    def fingerprint(self) -> str:
        """Hash of the whole layout; equal on all ranks or the ranks built different models."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def _round_up(value: int, quantum: int) -> int:
    return -(-value // quantum) * quantum


def _cut(name: str, specs: Sequence[ParamSpec], num_shards: int, index: int, persistent: bool) -> UnitLayout:
    slots: list[ParamSlot] = []
    offset = 0
    for spec in sorted(specs, key=lambda s: s.group):  # stable: model order inside a group
        slots.append(ParamSlot(spec.name, spec.shape, offset, spec.group, spec.aliases))
        offset = _round_up(offset + spec.numel, ALIGNMENT)
    return UnitLayout(name, index, tuple(slots), specs[0].dtype, specs[0].trainable, num_shards, persistent)


def _kind_name(dtype: str, trainable: bool, lane: int) -> str:
    return f"#{dtype}{'' if trainable else '.frozen'}{f'.lane{lane}' if lane else ''}"


def plan_shard_map(
    blocks: Iterable[tuple[str, Sequence[ParamSpec]]],
    *,
    num_shards: int,
    state_shards: int | None = None,
    persistence_threshold: int = 0,
    persistence_total: int | None = None,
) -> ShardMap:
    """Lay out named blocks of parameters.

    Args:
        blocks: (block name, its parameters in model order); each parameter in exactly one block.
        num_shards: ranks that share the model.
        state_shards: 1 if every rank keeps all optimizer state (stage 0); default `num_shards`.
        persistence_threshold: parameters with at most this many elements go to one persistent unit per dtype.
        persistence_total: at most this many elements become persistent in all (default: no bound).
    Raises:
        LayoutError: a parameter in two blocks, or no parameter at all.
    """
    if num_shards < 1:
        raise LayoutError(f"num_shards is {num_shards}; expected at least 1")
    planned: list[tuple[str, list[ParamSpec], bool]] = []
    small: dict[tuple[str, bool, int], list[ParamSpec]] = {}
    seen: dict[str, str] = {}
    budget = math.inf if persistence_total is None else persistence_total
    for block, specs in blocks:
        split: dict[tuple[str, bool, int], list[ParamSpec]] = {}
        for spec in specs:
            if spec.name in seen:
                raise LayoutError(
                    f"parameter {spec.name!r} is in unit {seen[spec.name]!r} and in unit {block!r}; name it once"
                )
            seen[spec.name] = block
            key = (spec.dtype, spec.trainable, spec.lane)
            if spec.numel <= persistence_threshold and spec.numel <= budget:
                budget -= spec.numel
                small.setdefault(key, []).append(spec)
            else:
                split.setdefault(key, []).append(spec)
        for position, (kind, members) in enumerate(split.items()):
            suffix = "" if position == 0 else _kind_name(*kind)
            planned.append((block + suffix, members, False))
    planned += [(f"persistent{_kind_name(*kind)}", members, True) for kind, members in small.items()]
    if not planned:
        raise LayoutError("the model has no parameters; expected at least one nn.Parameter")
    units = tuple(_cut(name, specs, num_shards, i, keep) for i, (name, specs, keep) in enumerate(planned))
    return ShardMap(units, num_shards, num_shards if state_shards is None else state_shards)
