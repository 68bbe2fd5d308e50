"""What an optimizer that is not elementwise sees of sharded parameters, and what it must offer: Protocols and data.

LAMB needs the norms of whole parameters, Muon whole matrices; flat segments of many parameters are no use to them. An
optimizer that is a `PiecewiseOptimizer` is handed every unit as a *batch* instead: its parameters (*slots*), the
*pieces* of them that this rank holds, and two ways to the rest, `sum` and `map_whole`, both served from the shard map.
It may as well be elementwise: a batch spares it the fp32 copy of the gradients and writes the 16-bit parameters in the
same pass.

Invariants
  - Every rank sees the same batches with the same slots in the same order, whether or not it holds pieces of them, and
    must make the same calls of `sum` and `map_whole`.
  - State lives in segments (one tensor per unit and group, as checkpoints know it); pieces are views of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["OptimizerPiece", "OptimizerSlot", "PieceBatch", "PiecewiseOptimizer"]


@dataclasses.dataclass(frozen=True)
class OptimizerSlot:
    """One parameter. `key` is its position among all parameters of the optimizer; `group` its live param group."""

    key: int
    name: str
    shape: tuple[int, ...]
    group: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerPiece:
    """Elements `[start, start + numel)` of slot number `slot`, all tensors 1-D views.

    Attributes:
        param: the fp32 master.
        grad: the mean gradient in its own dtype, to be multiplied by the batch's `grad_scale`; not to be written.
        out: the 16-bit parameter, which gets a rounded copy of the new master; None if the parameter is fp32.
        state: what `begin_step` returned, its per-element tensors cut to the piece.
    """

    slot: int
    start: int
    param: Tensor
    grad: Tensor
    out: Tensor | None
    state: Mapping[str, Any]


class PieceBatch(Protocol):
    """The parameters of one unit."""

    @property
    def slots(self) -> Sequence[OptimizerSlot]: ...

    @property
    def pieces(self) -> Sequence[OptimizerPiece]: ...

    @property
    def grad_scale(self) -> float:
        """Unscales and clips."""

    def sum(self, values: Tensor) -> Tensor:
        """fp64 `[len(slots), n]` of sums over this rank's pieces -> sums over whole parameters (collective)."""

    def map_whole(
        self, slots: Sequence[int], values: Mapping[int, Tensor], function: Callable[[int, Tensor], Tensor]
    ) -> Mapping[int, Tensor]:
        """Apply a function to whole parameters, each on one rank, and return its result's pieces (collective).

        Args:
            slots: those that take part, the same on every rank.
            values: slot -> this rank's piece of what the function is given, 1-D fp32.
            function: `(slot, fp32 tensor of the slot's shape)` -> fp32 tensor of as many elements.
        Returns:
            slot -> this rank's piece of the result.
        """


@runtime_checkable
class PiecewiseOptimizer(Protocol):
    """A torch optimizer that steps over batches of pieces."""

    def allocate(self, parameter: Tensor, group: dict[str, Any], /) -> dict[str, Any]:
        """Make the state of a 1-D tensor of parameters of one group unless it is there; return it.

        Per-element state has the tensor's shape; anything else is a number (or a tensor of one) for all its elements.
        """

    def begin_step(self, parameter: Tensor, group: dict[str, Any], /) -> dict[str, Any]:
        """`allocate`, and count the step. Called once per tensor and step, before its pieces are handed out."""

    def step_pieces(self, batches: Iterable[PieceBatch], /) -> None:
        """Step over all batches; what a batch holds is valid until the next is asked for."""
