"""A unit at run time: its parameters, its storage, its master copy and its gradient.

Parameter state machine (stage 3; at stages 0-2 a unit is always GATHERED):

    SHARDED --gather--> GATHERED --release--> SHARDED

    SHARDED   `param.data` is an empty placeholder; only `storage.shard` is resident
    GATHERED  `param.data` is a view of `storage.full`

Gradient vocabulary
    arrived   slots whose gradient autograd has finished in this micro-batch (it waits in `param.grad`)
    grad      the own range's reduced gradient; `grad_kind` says whether it holds nothing, a running fp32 sum, or the
              finished mean in the gradient dtype
    loose     the gradients as autograd made them, of a rank that shares the unit with nobody: `grad` puts them into
              one flat tensor only for those who ask for that; norm and update read `grad_parts`
    local     fp32 sum of micro-batches that `no_sync` kept from being reduced (full size; None otherwise)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_comm import Communicator, Work
from ds_zero._flat import FlatMemory
from ds_zero._param import mark_gathered, mark_released
from ds_zero._storage import ParamStorage, ReplicatedStorage, ShardedStorage
from ds_zero.errors import ZeroStateError
from ds_zero.layout import ALIGNMENT, ParamSlot, Piece, ShardMap, UnitLayout

__all__ = ["GradKind", "Unit", "UnitStatus", "copy_changed"]


class UnitStatus(enum.Enum):
    """Where a unit's parameters are."""

    SHARDED = "sharded"
    GATHERED = "gathered"


class GradKind(enum.Enum):
    """What `Unit.grad` holds."""

    EMPTY = "empty"
    SUM = "sum"
    MEAN = "mean"


def copy_changed(master: Tensor, old: Tensor, new: Tensor) -> bool:
    """Overwrite those elements of an fp32 `master` whose 16-bit value really changed; the others keep their precision.

    Returns whether anything changed. All tensors are 1-D and of one length.
    """
    changed = old != new
    if not bool(changed.any()):
        return False
    torch.where(changed, new.to(master.dtype), master, out=master)
    return True


class Unit:
    """One `UnitLayout` with live tensors."""

    def __init__(
        self,
        layout: UnitLayout,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        shard_map: ShardMap,
        *,
        shard_params: bool,
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.comm = comm
        self.status = UnitStatus.GATHERED
        self.start, self.stop = shard_map.state_range(layout, comm.rank)
        device = parameters[0].device if parameters[0].device.type != "meta" else torch.device("cpu")
        self.device = device
        self.sharded = shard_params and not layout.persistent
        self.storage: ParamStorage = (
            ShardedStorage(layout, comm, device)
            if self.sharded
            else ReplicatedStorage(layout, comm, (self.start, self.stop), device)
        )
        self.master: Tensor | None = None
        self._grad: Tensor | None = None
        self._loose: list[Tensor | None] | None = None
        self.grad_kind = GradKind.EMPTY
        self.local: Tensor | None = None
        self.arrived: set[int] = set()
        self._index = {slot.name: index for index, slot in enumerate(layout.slots)}
        self.held: set[int] = set()
        """Slots whose `param.data` is a private copy, owned by GatheredParameters."""
        self.pinned = False
        """Whether `release` does nothing: the whole model is gathered (`ShardedModel.gather`)."""
        self._versions: list[int] = []

    # -- values -------------------------------------------------------------------------------------------------

    def load(self, value_of: Callable[[int], Tensor], *, masters: FlatMemory | None) -> None:
        """Take the initial values and make the master copy of the own range. Collective when sharded.

        Args:
            value_of: slot index -> the full value, any float dtype; called once per slot, in order.
            masters: memory for the master copy; None for a unit that no optimizer updates.
        """
        own = self.storage.own
        if masters is not None:
            same = own.dtype == torch.float32
            self.master = own if same else masters.take(own.numel(), torch.float32, self.device).zero_()
        for index, slot in enumerate(self.layout.slots):
            value = value_of(index).detach().reshape(-1)
            self.storage.write(slot.offset, value)
            if self.master is not None and self.master is not own:
                low, high = max(self.start, slot.offset), min(self.stop, slot.stop)
                if low < high:
                    self.master[low - self.start : high - self.start].copy_(
                        value[low - slot.offset : high - slot.offset]
                    )
        self.storage.settle()

    def view(self, slot: ParamSlot) -> Tensor:
        """The parameter's place in `full` (valid while gathered), in its own shape."""
        return self.storage.full[slot.offset : slot.stop].view(slot.shape)

    def publish(self, bucket_numel: int) -> None:
        """Cast the master into the parameters' memory (done by the update) and exchange it."""
        self.storage.publish(bucket_numel)
        if self.pinned:
            self.storage.gather()

    # -- gather and release ------------------------------------------------------------------------------------

    def gather(self, async_op: bool = False) -> Work | None:
        """Make the full parameters available on this rank."""
        work = self.storage.gather(async_op=async_op)
        if self.status is UnitStatus.SHARDED:
            self.status = UnitStatus.GATHERED
            self.attach()
        return work

    def attach(self) -> None:
        """Point the parameters at `full`, those held by GatheredParameters excepted."""
        for index, (slot, parameter) in enumerate(zip(self.layout.slots, self.parameters, strict=True)):
            if index not in self.held:
                mark_gathered(parameter)
                parameter.data = self.view(slot)
        self._versions = [parameter._version for parameter in self.parameters]

    def release(self) -> None:
        """Give the gathered memory back; the own shard stays. Replicated and pinned units stay gathered."""
        if self.status is UnitStatus.SHARDED or not self.sharded or self.pinned:
            return
        self.detach()
        self.storage.release()

    def detach(self) -> None:
        """Replace the parameters' data by empty placeholders, those held by GatheredParameters excepted."""
        self.status = UnitStatus.SHARDED
        for index, parameter in enumerate(self.parameters):
            if index not in self.held:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                mark_released(parameter)

    # -- one parameter (GatheredParameters, safe_get_*) ---------------------------------------------------------

    def fetch(self, index: int) -> Tensor:
        """A private 1-D copy of one whole parameter; collective when sharded."""
        slot = self.layout.slots[index]
        was_resident = self.storage.resident
        self.storage.gather()
        value = self.storage.full[slot.offset : slot.stop].clone()
        if not was_resident:
            self.storage.release()
        return value

    def store(self, index: int, value: Tensor) -> None:
        """Write one whole parameter (1-D) into the own shard and the master; collective when sharded."""
        slot = self.layout.slots[index]
        value = value.to(self.storage.full.dtype)
        if self.sharded:  # gathering is one-sided on shared memory: wait until no rank reads the old values any more
            self.comm.barrier(label=f"before {slot.name} is written")
        low, high = max(self.start, slot.offset), min(self.stop, slot.stop)
        if self.master is not None and self.master is not self.storage.own and low < high:
            part = slice(low - self.start, high - self.start)
            copy_changed(self.master[part], self.storage.own[part], value[low - slot.offset : high - slot.offset])
        self.storage.write(slot.offset, value)
        self.storage.settle()

    # -- changes made by the user ------------------------------------------------------------------------------

    def absorb_edits(self) -> bool:
        """Carry values that the user wrote into the parameters over into the master (16-bit, stages 0-2).

        Autograd's version counters tell that somebody wrote in place since the last `attach`/`absorb_edits`.
        """
        versions = [parameter._version for parameter in self.parameters]
        if versions == self._versions:
            return False
        self._versions = versions
        if self.master is None or self.master is self.storage.own:
            return True
        return copy_changed(self.master, self.master.to(self.storage.own.dtype), self.storage.own)

    # -- gradient ----------------------------------------------------------------------------------------------

    @property
    def grad(self) -> Tensor | None:
        """The own range's gradient in one flat tensor; None without one."""
        if self._loose is not None:
            flat = torch.empty(self.stop - self.start, dtype=self.storage.full.dtype, device=self.device)
            self._fill(flat, self.start, self.stop)
            self.grad = flat
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._loose = None
        self._grad = value

    def keep_loose(self) -> None:
        """The waiting gradients are the own range's gradient already: take them as they lie."""
        for piece in self.layout.pieces(self.start, self.stop):
            self._check(self.parameters[self._index[piece.slot.name]].grad, piece.slot)
        self._loose = [parameter.grad for parameter in self.parameters]
        self._grad = None
        self.collected()

    def grad_parts(self, offset: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Elements `[offset, offset + numel)` of the gradient, as 1-D tensors and where in that range each begins.

        The range is a segment's. Parts begin and end at multiples of ALIGNMENT, so that an elementwise kernel rounds
        as it does in the flat tensor; gaps of the layout may be left out: they are zero, and stay zero when updated.
        """
        if self._loose is None or self.device.type != "cpu":  # elsewhere few long kernels are better than many short
            assert self.grad is not None
            yield 0, self.grad[offset : offset + numel]
            return
        for piece in self.layout.pieces(self.start + offset, self.start + offset + numel):
            grad = self._loose[self._index[piece.slot.name]]
            if grad is None:
                grad = torch.zeros(piece.slot.numel, dtype=self.storage.full.dtype)
            flat = grad.reshape(-1)[piece.start : piece.stop]
            whole = piece.numel - piece.numel % ALIGNMENT
            if whole:
                yield piece.offset, flat[:whole]
            if whole < piece.numel:
                rest = torch.zeros(ALIGNMENT, dtype=flat.dtype)
                rest[: piece.numel - whole].copy_(flat[whole:])
                yield piece.offset + whole, rest

    def grad_of(self, piece: Piece) -> Tensor:
        """The gradient of one piece of the own range, 1-D; read only."""
        if self._loose is None:
            assert self._grad is not None
            return self._grad[piece.offset : piece.offset + piece.numel]
        grad = self._loose[self._index[piece.slot.name]]
        if grad is None:
            return torch.zeros(piece.numel, dtype=self.storage.full.dtype, device=self.device)
        return grad.reshape(-1)[piece.start : piece.stop]

    @property
    def complete(self) -> bool:
        """Whether autograd has finished every gradient of the unit."""
        return len(self.arrived) == len(self.parameters)

    def densify(self) -> None:
        """Make sparse gradients (of embeddings) dense."""
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()

    @property
    def num_rows(self) -> int:
        """Rows of the table that buckets cut into columns: one per shard, or one where nothing is sharded."""
        return self.layout.padded_numel // (self.stop - self.start)

    def collect(self, out: Tensor, columns: slice) -> None:
        """Copy the waiting gradients of a range of columns into `out`, row by row.

        A parameter without a gradient contributes zeros; so do the gaps of the layout. The gradients stay until
        `collected`.
        """
        width = self.stop - self.start
        for row, part in enumerate(out.view(self.num_rows, -1)):
            start = row * width + columns.start
            self._fill(part, start, row * width + columns.stop)
            if self.local is not None:
                part.add_(self.local[start : row * width + columns.stop])

    def _fill(self, out: Tensor, start: int, stop: int) -> None:
        """Copy the gradients of `[start, stop)` of the flat into `out`: the loose ones, else those that wait."""
        filled = 0
        for piece in self.layout.pieces(start, stop):
            out[filled : piece.offset].zero_()
            filled = piece.offset + piece.numel
            index = self._index[piece.slot.name]
            grad = self.parameters[index].grad if self._loose is None else self._loose[index]
            self._check(grad, piece.slot)
            if grad is None:
                out[piece.offset : filled].zero_()
            else:
                out[piece.offset : filled].copy_(grad.reshape(-1)[piece.start : piece.stop])
        out[filled:].zero_()

    def _check(self, grad: Tensor | None, slot: ParamSlot) -> None:
        if grad is not None and grad.shape != torch.Size(slot.shape):
            raise ZeroStateError(
                f"gradient of {slot.name!r} has shape {tuple(grad.shape)}, expected {slot.shape};"
                " was .grad assigned by hand?"
            )

    def collected(self) -> None:
        """The waiting gradients have been copied; forget them."""
        for parameter in self.parameters:
            parameter.grad = None
        self.local = None
        self.arrived.clear()

    def collect_local(self) -> None:
        """Add the waiting gradients to the unreduced fp32 sum (`no_sync`)."""
        if all(parameter.grad is None for parameter in self.parameters):
            self.arrived.clear()
            return
        if self.local is None:
            self.local = torch.zeros(self.layout.padded_numel, dtype=torch.float32, device=self.device)
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            if parameter.grad is not None:
                self.local[slot.offset : slot.stop].view(slot.shape).add_(parameter.grad)
                parameter.grad = None
        self.arrived.clear()

    def close(self) -> None:
        """Give all memory back; the parameters keep their full values as ordinary tensors."""
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            if self.status is UnitStatus.GATHERED:
                parameter.data = self.view(slot).clone()
        self.grad = self.local = None
        self.storage.close()
