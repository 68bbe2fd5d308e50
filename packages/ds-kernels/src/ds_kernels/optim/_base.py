"""What the optimizers share: parameters and their states as flat tensors, whole or in pieces.

Vocabulary
    slot     one parameter of a batch: its shape, its group, a number of its own (`key`).
    piece    the elements of one slot that are here: flat views of parameter, gradient and state.
    batch    slots that are stepped together, the pieces of them that are here, and the way to the others: `sum` and
             `map_whole`. For a parameter that is here whole both are trivial (`WholeBatch`).

`step()` walks over whole parameters. Who shards parameters over processes (ds_zero does) hands out batches of pieces
instead, calling `begin_step` for each tensor that holds state and then `step_pieces`; there is no other path, so both
give the same result. An optimizer needs nothing of a piece but its own elements, apart from LAMB's norms (`sum`) and
Muon's matrices (`map_whole`).
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_kernels._checks import require
from ds_kernels.errors import KernelArgumentError
from ds_kernels.optim.functional import seed_at

__all__ = ["Batch", "ElementwiseOptimizer", "FlatOptimizer", "Piece", "Slot", "WholeBatch", "check_betas", "check_rate"]

STATE_DTYPES = (torch.float32, torch.bfloat16)


class Slot(Protocol):
    """One parameter of a batch."""

    @property
    def key(self) -> int:
        """The parameter's position among all of the optimizer's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""

    @property
    def group(self) -> dict[str, Any]:
        """Its param group."""


class Piece(Protocol):
    """Elements `[start, start + numel)` of one slot, all tensors flat and contiguous."""

    @property
    def slot(self) -> int:
        """Index in the batch's slots."""

    @property
    def start(self) -> int: ...

    @property
    def param(self) -> Tensor: ...

    @property
    def grad(self) -> Tensor: ...

    @property
    def out(self) -> Tensor | None:
        """Gets a copy of the updated elements in its own dtype."""

    @property
    def state(self) -> Mapping[str, Any]:
        """What `begin_step` returned, its tensors cut to the piece."""


class Batch(Protocol):
    """Slots, the pieces of them that are here, and the others' help. Every process sees the same slots."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def grad_scale(self) -> float:
        """Gradients are to be multiplied by it."""

    def sum(self, values: Tensor) -> Tensor:
        """Values fp64 [slots, n] added up over all pieces everywhere."""

    def map_whole(
        self, slots: Sequence[int], values: Mapping[int, Tensor], function: Callable[[int, Tensor], Tensor]
    ) -> Mapping[int, Tensor]:
        """Apply a function to whole parameters of which `values` (slot -> flat) holds the pieces that are here.

        `function(slot, tensor of the slot's shape)` returns a tensor of equal numel and dtype, of which the same pieces
        come back. `slots` names all that take part anywhere.
        """


@dataclass(frozen=True)
class _WholeSlot:
    key: int
    shape: tuple[int, ...]
    group: dict[str, Any]


@dataclass(frozen=True)
class _WholePiece:
    param: Tensor
    grad: Tensor
    state: Mapping[str, Any]
    slot: int = 0
    start: int = 0
    out: Tensor | None = None


@dataclass(frozen=True)
class WholeBatch:
    """One parameter, all of it here."""

    slots: tuple[_WholeSlot]
    pieces: tuple[_WholePiece]
    grad_scale: float

    def sum(self, values: Tensor) -> Tensor:
        return values

    def map_whole(
        self, slots: Sequence[int], values: Mapping[int, Tensor], function: Callable[[int, Tensor], Tensor]
    ) -> Mapping[int, Tensor]:
        return {slot: function(slot, values[slot].view(self.slots[slot].shape)).reshape(-1) for slot in slots}


def check_rate(name: str, **values: float) -> None:
    """Learning rates, epsilons and decays are not negative."""
    for key, value in values.items():
        require(not value < 0, f"{name}: {key} is {value}; expected a number >= 0")


def check_betas(name: str, betas: Sequence[float]) -> None:
    """Two averaging factors in [0, 1)."""
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"{name}: betas are {tuple(betas)}; expected two numbers in [0, 1)",
    )


class FlatOptimizer(Optimizer, abc.ABC):
    """An optimizer over flat tensors; subclasses say which states there are and how pieces are updated.

    Args:
        params: parameters (fp32, bf16, fp16 or fp64; dense gradients) or param groups.
        state_dtype: fp32 (default) or bf16, of per-element states; those of fp64 parameters are fp64.
        stochastic_rounding: round bf16 parameters and states up or down with the probability of the distance, so that
            updates below half a unit in the last place are not lost.
        seed: of the stochastic rounding.
    """

    carried: ClassVar[tuple[str, ...]] = ("state_dtype", "stochastic_rounding", "seed")
    """Attributes of its own that a copy or a pickle takes along."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        require(
            state_dtype is None or state_dtype in STATE_DTYPES,
            f"{type(self).__name__}: state_dtype is {state_dtype}; supported are float32 and bfloat16",
        )
        self.state_dtype = torch.float32 if state_dtype is None else state_dtype
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which takes along groups and states and nothing of a subclass; with what is `carried`."""
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in self.carried}

    @abc.abstractmethod
    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        """The per-element states of a group's parameters."""

    @abc.abstractmethod
    def step_pieces(self, batches: Iterable[Batch]) -> None:
        """One step over batches of pieces. Every process calls it with the same slots in the same order."""

    # -- state ---------------------------------------------------------------------------------------------------

    def allocate(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a tensor that holds parameters of one group, made if it is not there yet."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        dtype = self.dtype_of_state(parameter)
        for name in self.state_names(group):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        return state

    def dtype_of_state(self, parameter: Tensor) -> torch.dtype:
        """The dtype of a parameter's states."""
        return torch.float64 if parameter.dtype == torch.float64 else self.state_dtype

    def begin_step(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Count a step and return the state, `allocate`d. Called once per step and tensor, before `step_pieces`."""
        state = self.allocate(parameter, group)
        state["step"] += 1
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the dtype they have here (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                        own = torch.empty(value.shape, dtype=self.dtype_of_state(parameter), device=parameter.device)
                        self.state[parameter][name] = own.copy_(value)

    # -- stepping ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One step over all parameters that have a gradient; returns what `closure` returned.

        Args:
            grad_scale: multiplies every gradient on the way, for example 1 / loss_scale.
        Raises:
            KernelArgumentError: a sparse gradient, or a dtype that is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_pieces(self._whole(grad_scale))
        return loss

    def _whole(self, grad_scale: float) -> Iterator[WholeBatch]:
        key = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                key += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise KernelArgumentError(
                        f"{type(self).__name__}: the gradient of a parameter of shape {tuple(parameter.shape)} is"
                        " sparse; supported are dense gradients (for nn.Embedding: sparse=False)"
                    )
                state = {
                    name: value.view(-1) if isinstance(value, Tensor) and value.shape == parameter.shape else value
                    for name, value in self.begin_step(parameter, group).items()
                }
                flat = parameter.detach().contiguous()
                piece = _WholePiece(flat.view(-1), parameter.grad.contiguous().view(-1), state)
                yield WholeBatch((_WholeSlot(key - 1, tuple(parameter.shape), group),), (piece,), grad_scale)
                if flat.data_ptr() != parameter.data_ptr():
                    parameter.copy_(flat)

    def seed_of(self, batch: Batch, piece: Piece) -> int | None:
        """Of a piece's stochastic rounding: differs between parameters and steps; None to round to nearest."""
        if not self.stochastic_rounding:
            return None
        text = f"{self.seed} {batch.slots[piece.slot].key} {int(piece.state['step'])}"
        return seed_at(zlib.crc32(text.encode()), piece.start)


class ElementwiseOptimizer(FlatOptimizer):
    """An optimizer whose update of an element needs nothing of the others."""

    @abc.abstractmethod
    def update(self, batch: Batch, piece: Piece, seed: int | None) -> None:
        """Update one piece."""

    @torch.no_grad()
    def step_pieces(self, batches: Iterable[Batch]) -> None:
        """Piece by piece."""
        for batch in batches:
            for piece in batch.pieces:
                self.update(batch, piece, self.seed_of(batch, piece))
