"""What a model became under tensor parallelism: its parts, what ranks share, and the way back to the whole.

A rank's parameter is a part of a whole one, (dimension, ranges), or all of it. `AppliedPlan` knows which for every name
of the state dict, cuts whole tensors (`cut`), joins parts (`joined`, `gather_state_dict`), fills a model from a
checkpoint of which each rank reads only its ranges (`load`), and sums the gradients of what ranks hold in common.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_comm import Communicator
from ds_inference.errors import ModelError
from ds_inference.loader import Checkpoint
from ds_inference.tp.plan import TensorParallelPlan
from ds_inference.tp.split import Piece

__all__ = ["AppliedPlan", "CopiedRows", "Part", "part_of"]

Part = tuple[int, Piece] | None


def part_of(whole: Tensor, part: Part) -> Tensor:
    """The ranges of a tensor one after the other, in memory of their own; the tensor itself for None."""
    if part is None:
        return whole
    dim, ranges = part
    if not ranges:
        return whole.narrow(dim, 0, 0).clone()
    pieces = [whole.narrow(dim, low, high - low) for low, high in ranges]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class CopiedRows:
    """The outputs of a projection that other ranks may hold as well.

    Attributes:
        dim: the weight's dimension of outputs. rows: those that are copies, in this rank's part.
        slot, num_slots: where they are among the outputs that all ranks' copies are of.
        first: whether no lower rank holds them.
    """

    dim: int
    rows: tuple[int, int]
    slot: int
    num_slots: int
    first: bool


class AppliedPlan:
    """A plan, the group it was applied over, and the model that it was applied to.

    Attributes:
        plan: printable. communicator: of the tensor-parallel group. rank, size: in it.
    """

    def __init__(self, plan: TensorParallelPlan, communicator: Communicator, model: nn.Module) -> None:
        self.plan = plan
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size
        self._model = weakref.ref(model)
        self._parts = [dict(plan.tensors(rank)) for rank in range(self.size)]
        self._summed: list[tuple[nn.Parameter, CopiedRows | None]] = []
        self._counted_elsewhere: set[int] = set()
        self._partly: str | None = None

    def __repr__(self) -> str:
        return f"AppliedPlan(rank {self.rank} of {self.size})"

    def __deepcopy__(self, memo: dict[int, object]) -> AppliedPlan:
        raise ModelError("a model that is split over tensor-parallel ranks cannot be copied; copy it before")

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ModelError("the model of this plan is gone; keep it as long as the plan is used")
        return model

    # -- being applied --------------------------------------------------------------------------------------------

    def sum_gradient(self, parameter: nn.Parameter, rows: CopiedRows | None) -> None:
        """Sum this parameter's gradient over the ranks in every backward: all of it (None), or its copied rows."""
        if any(parameter is known for known, _ in self._summed):
            return
        self._summed.append((parameter, rows))
        wanted = parameter.requires_grad
        parameter.requires_grad_(True)  # the hook is for whenever it is trained
        parameter.register_hook(functools.partial(_summed_gradient, self.communicator, rows))
        parameter.requires_grad_(wanted)

    def finish(self) -> None:
        """All modules are split: remember what is counted by which rank, and the names that ties add."""
        model = self.model
        by_identity: dict[int, str] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            if name in self._parts[0]:
                by_identity.setdefault(id(parameter), name)
        for name, parameter in named:
            known = by_identity.get(id(parameter))
            for parts in self._parts:
                parts.setdefault(name, None if known is None else parts[known])
        copies = {id(p): rows for p, rows in self._summed if rows is not None}
        for name, parameter in named:
            rows = copies.get(id(parameter))
            if rows is None:
                whole = self._parts[self.rank].get(name) is None
                counted = self.rank == 0 or not whole
            else:
                counted = rows.first
                if rows.rows[0] > 0 and parameter.dim() > 1:
                    self._partly = name
            if not counted:
                self._counted_elsewhere.add(id(parameter))

    # -- what ranks share -----------------------------------------------------------------------------------------

    def duplicates(self) -> list[nn.Parameter]:
        """The parameters here that a lower rank counts in norms and saves.

        ModelError for a fused projection of which only some rows are copies: train on at most as many ranks as the
        model has key/value heads.
        """
        if self._partly is not None:
            raise ModelError(
                f"{self._partly} holds query heads of this rank and copies of key/value heads in one parameter, so its "
                f"norm cannot be counted once; train on at most {self.plan.heads.num_kv_heads} tensor-parallel ranks"
            )
        return [p for p in self.model.parameters() if id(p) in self._counted_elsewhere]

    # -- parts and wholes -----------------------------------------------------------------------------------------

    def part(self, name: str, rank: int | None = None) -> Part:
        """What a rank (default: this one) holds of a tensor of the state dict."""
        return self._parts[self.rank if rank is None else rank].get(name)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return part_of(whole, self.part(name))

    def cut_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a whole model's state dict."""
        return {name: self.cut(name, value) for name, value in state.items()}

    def whole_shape(self, name: str, local: Tensor) -> tuple[int, ...]:
        """The shape of what `local` is this rank's part of."""
        shape, part = list(local.shape), self.part(name)
        if part is not None:
            shape[part[0]] = max(high for parts in self._parts for _, high in parts[name][1])  # type: ignore[index]
        return tuple(shape)

    def joined(self, name: str, local: Tensor, *, everywhere: bool = False) -> Tensor | None:
        """The whole tensor from the ranks' parts, on the first rank (None elsewhere) or everywhere; collective."""
        part = self.part(name)
        keeps = everywhere or self.rank == 0
        if part is None or self.size == 1:
            return local if keeps else None
        parts = [self._parts[rank][name] for rank in range(self.size)]
        dim = part[0]
        sizes = [sum(high - low for low, high in ranges) for _, ranges in parts if ranges is not None]  # type: ignore[misc]
        rest = local.numel() // max(local.shape[dim], 1)
        most = max(sizes) * rest
        padded = local.new_zeros(most)
        padded[: local.numel()] = local.detach().movedim(dim, 0).reshape(-1)
        everyone = local.new_empty(self.size * most)
        self.communicator.all_gather_into(everyone, padded, label=f"state dict: {name}")
        if not keeps:
            return None
        shape = local.movedim(dim, 0).shape[1:]
        whole = local.new_empty(self.whole_shape(name, local)[dim], *shape)
        for rank, one in enumerate(parts):
            piece = everyone[rank * most : rank * most + sizes[rank] * rest].view(sizes[rank], *shape)
            at = 0
            for low, high in one[1]:  # type: ignore[index]
                whole[low:high] = piece[at : at + high - low]
                at += high - low
        return whole.movedim(0, dim).contiguous()

    @torch.no_grad()
    def gather_state_dict(self, *, everywhere: bool = False) -> dict[str, Tensor] | None:
        """The whole model's state dict on CPU, on the first rank (None elsewhere) or everywhere; collective.

        Tied tensors are one. One tensor travels at a time.
        """
        whole: dict[tuple[int, int], Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            key = (id(value), 0)
            if key not in whole:
                found = self.joined(name, value.detach(), everywhere=everywhere)
                whole[key] = torch.empty(0) if found is None else found.cpu().clone()
            state[name] = whole[key]
        return state if everywhere or self.rank == 0 else None

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Fill the model from a checkpoint, of which this rank reads only its ranges.

        Args:
            dtype, device: of the tensors that replace those on the meta device; default: as in the checkpoint, CPU.
            rename: names in the checkpoint by names of the model, where they differ.
        Returns:
            names of parameters and persistent buffers that the checkpoint does not have and no tie gives.
        """
        missing: list[str] = []
        filled: set[int] = set()
        replaced: dict[int, nn.Parameter] = {}
        for name, value in list(self._named_state()):
            stored = (rename or {}).get(name, name)
            if id(value) in filled:
                continue
            if stored not in checkpoint:
                missing.append(name)
                continue
            if checkpoint.shape(stored) != self.whole_shape(name, value):
                raise ModelError(
                    f"{stored} of {checkpoint.path} is {checkpoint.shape(stored)}, but {name} of the whole model is "
                    f"{self.whole_shape(name, value)}; it is a checkpoint of another model"
                )
            part = self.part(name)
            dim, ranges = (None, ()) if part is None else part
            wanted = dtype if value.is_floating_point() else None
            read = checkpoint.read(stored, dim, ranges, dtype=wanted, device=device)
            filled.add(id(value))
            if not value.is_meta:
                value.copy_(read)
            elif isinstance(value, nn.Parameter):
                replaced[id(value)] = nn.Parameter(read, requires_grad=value.requires_grad)
            else:
                self._set_buffer(name, read)
        self._exchange(replaced)
        tied = filled | {id(p) for p in replaced.values()}
        return [name for name in missing if id(self._state_tensor(name)) not in tied]

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.state_dict(keep_vars=True).items()

    def _state_tensor(self, name: str) -> Tensor:
        home, _, last = name.rpartition(".")
        found: Any = getattr(self.model.get_submodule(home), last)
        assert isinstance(found, Tensor)
        return found

    def _set_buffer(self, name: str, value: Tensor) -> None:
        home, _, last = name.rpartition(".")
        self.model.get_submodule(home)._buffers[last] = value

    def _exchange(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Put parameters with memory in the place of those on the meta device, with what is done to their gradients."""
        if not replaced:
            return
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in replaced:
                    module._parameters[name] = replaced[id(parameter)]
        summed, self._summed = self._summed, []
        for parameter, rows in summed:
            self.sum_gradient(replaced.get(id(parameter), parameter), rows)
        self._counted_elsewhere = {id(replaced[one]) if one in replaced else one for one in self._counted_elsewhere}


def _summed_gradient(communicator: Communicator, rows: CopiedRows | None, gradient: Tensor) -> Tensor:
    """The sum over the ranks of a whole gradient, or of the copied rows in it."""
    if rows is None:
        total = gradient.clone(memory_format=torch.contiguous_format)
        communicator.all_reduce(total, label="gradient of a norm inside of heads")
        return total
    dim = rows.dim if gradient.dim() > 1 else 0
    low, high = rows.rows
    shape = list(gradient.shape)
    shape[dim] = rows.num_slots
    total = gradient.new_zeros(shape)
    total.narrow(dim, rows.slot, high - low).copy_(gradient.narrow(dim, low, high - low))
    communicator.all_reduce(total, label="gradient of copied key/value heads")
    gradient = gradient.clone()
    gradient.narrow(dim, low, high - low).copy_(total.narrow(dim, rows.slot, high - low))
    return gradient
