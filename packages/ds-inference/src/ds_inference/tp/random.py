"""Random numbers under tensor parallelism: alike where ranks compute the same, each its own where they do not.

A dropout outside of the split *regions* must drop the same on every rank, or the ranks' activations part for good; in
a region each rank has other heads, maybe another number of them, and draws as many numbers as it needs. So a region
draws from a stream of its own, begun by a number that all ranks draw, and gives the common generator back as it left
it. Only models that draw in a region pay for this.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ds_comm.device
from ds_comm import Communicator

__all__ = ["SplitRandom", "align_random"]


class SplitRandom:
    """The random numbers of one region: a column-parallel layer opens it, the row-parallel one ends it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._common: tuple[Tensor, Tensor | None] | None = None

    def enter(self) -> None:
        """Leave the common stream. A region that was left by an error, or by a checkpoint's early stop, begins anew."""
        seed = int(torch.randint(1 << 47, ()))
        self._common = _state()
        torch.manual_seed(seed * 1021 + self.rank)

    def leave(self) -> None:
        """Go on in the common stream."""
        if self._common is not None:
            _set_state(*self._common)
            self._common = None


def align_random(communicator: Communicator) -> None:
    """Give every rank the generator states of the group's first rank; collective."""
    if communicator.size == 1:
        return
    own, device = _state()
    moved = own if communicator.kind != "torch" or device is None else own.to(ds_comm.device.current_device())
    communicator.broadcast(moved, 0, label="tensor parallel: random state")
    if device is not None:
        on_device = device.to(moved.device)
        communicator.broadcast(on_device, 0, label="tensor parallel: random state of the device")
        device = on_device.cpu()
    _set_state(moved.cpu(), device)


def _state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_state(cpu: Tensor, device: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(device)
