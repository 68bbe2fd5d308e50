"""Batches of pieces, served from the shard map (see `pieces`).

`map_whole` gives each whole parameter to one rank: the largest first, to the rank with the least work so far. Pieces go
there and results come back in one all_to_all each, every element once; a function sees the same tensor as without
sharding, so its result has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_zero._unit import Unit
from ds_zero.layout import Piece, UnitLayout
from ds_zero.pieces import OptimizerPiece, OptimizerSlot

__all__ = ["UnitBatch"]


@dataclass(frozen=True)
class UnitBatch:
    """A `PieceBatch` over one unit."""

    unit: Unit
    slots: tuple[OptimizerSlot, ...]
    pieces: tuple[OptimizerPiece, ...]
    grad_scale: float

    @property
    def _is_whole(self) -> bool:
        return (self.unit.start, self.unit.stop) == (0, self.unit.layout.padded_numel)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over the ranks that share the unit's state."""
        if self._is_whole:
            return values
        total = values.to(self.unit.device, copy=True).contiguous()
        self.unit.comm.all_reduce(total, label=f"{self.unit.layout.name}: sums over parameters")
        return total.to(values.device)

    def map_whole(
        self, slots: Sequence[int], values: Mapping[int, Tensor], function: Callable[[int, Tensor], Tensor]
    ) -> Mapping[int, Tensor]:
        """Apply `function` to whole parameters; see `PieceBatch`."""
        if self._is_whole:
            return {slot: function(slot, values[slot].view(self.slots[slot].shape)).reshape(-1) for slot in slots}
        comm, layout = self.unit.comm, self.unit.layout
        owners = _owners(layout, slots, comm.size)
        mine = {rank: list(_parts(layout, rank, slots)) for rank in range(comm.size)}
        label = f"{layout.name}: whole parameters for {function.__name__}"
        # to the owners: my pieces ordered by owner; from everybody: their pieces of what I own
        order = [[slot for slot, _ in mine[comm.rank] if owners[slot] == owner] for owner in range(comm.size)]
        theirs = [[(slot, piece) for slot, piece in mine[rank] if owners[slot] == comm.rank] for rank in mine]
        sent = [sum(values[slot].numel() for slot in part) for part in order]
        received = [sum(piece.numel for _, piece in part) for part in theirs]
        outgoing = self._joined([values[slot] for part in order for slot in part])
        incoming = torch.empty(sum(received), dtype=torch.float32, device=self.unit.device)
        comm.all_to_all_into(incoming, outgoing, received, sent, label=label)
        results = {}
        for slot, whole in self._assembled(theirs, incoming).items():
            results[slot] = function(slot, whole.view(self.slots[slot].shape)).reshape(-1)
        replies = self._joined([results[slot][piece.start : piece.stop] for part in theirs for slot, piece in part])
        back = torch.empty_like(outgoing)
        comm.all_to_all_into(back, replies, sent, received, label=label)
        flat = [slot for part in order for slot in part]
        return dict(zip(flat, back.split([values[slot].numel() for slot in flat]), strict=True)) if flat else {}

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=self.unit.device)

    def _assembled(self, parts: list[list[tuple[int, Piece]]], incoming: Tensor) -> dict[int, Tensor]:
        """Whole parameters (1-D) from their pieces, which lie in `incoming` one after another."""
        found: dict[int, Tensor] = {}
        offset = 0
        for slot, piece in (entry for part in parts for entry in part):
            whole = found.get(slot)
            if whole is None:
                whole = found[slot] = torch.empty(piece.slot.numel, dtype=torch.float32, device=self.unit.device)
            whole[piece.start : piece.stop] = incoming[offset : offset + piece.numel]
            offset += piece.numel
        return found


def _parts(layout: UnitLayout, rank: int, slots: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    """The pieces of the given slots in a rank's shard, in the order of the flat."""
    indices = {layout.slots[slot].name: slot for slot in slots}
    for piece in layout.pieces(*layout.shard_range(rank)):
        if piece.slot.name in indices:
            yield indices[piece.slot.name], piece


def _owners(layout: UnitLayout, slots: Sequence[int], size: int) -> dict[int, int]:
    """Slot -> the rank that computes it: the largest first, each to the rank with the least work."""
    work = [0.0] * size
    owners = {}

    def cost(slot: int) -> float:  # of a product with itself: numel times the shorter side
        shape = layout.slots[slot].shape
        rows = shape[0] if shape else 1
        return float(math.prod(shape)) * min(rows, math.prod(shape[1:]))

    for slot in sorted(slots, key=lambda slot: (-cost(slot), slot)):
        owners[slot] = min(range(size), key=lambda rank: (work[rank], rank))
        work[owners[slot]] += cost(slot)
    return owners
