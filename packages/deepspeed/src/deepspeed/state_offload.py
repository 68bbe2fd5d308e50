"""Optimizer state out of the way between phases of training: `engine.offload_states` and `reload_states`.

What moves is the state of the wrapped optimizer (Adam's moments: 8 of the 12 bytes per parameter that an update needs).
On an accelerator it moves to host memory; anywhere it moves to files with device "nvme". On a host without accelerator
"cpu" is where it is already, so nothing moves then, which the log says. Masters, parameters and gradients stay: they
are views of buffers that the units, and with shared memory the other ranks, go on using.

Vocabulary
    storage  one allocation; many tensors of the state lie in it. Its bytes are freed underneath, so that what knows
             the storage (ds_zero's flat memory) stays right; the tensors are made empty, since reading a tensor whose
             storage has no bytes would crash the process.
    gate     ds_zero's: whoever reads or writes optimizer state passes it, and passing it brings the state back. A step,
             a save or a load after `offload_states` is therefore no mistake, only slower.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

import ds_comm.device
import ds_zero
from deepspeed.config import ResolvedConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.utils.logging import log_dist

__all__ = ["OffloadedState", "StateOffloading"]

Name = TypeVar("Name", OffloadDeviceEnum, OffloadStateTypeEnum)


class OffloadedState:
    """The optimizer state of this rank while it is elsewhere.

    Args:
        optimizer: its state is emptied; nothing is freed before all of it is written.
        folder: of the (nameless) file that takes the bytes; None keeps them in host memory.
        pin_memory: page-locked host memory, where there is an accelerator.

    Raises:
        OSError: the file cannot be written; the state stays as it was.
    """

    def __init__(self, optimizer: ds_zero.ZeroOptimizer, folder: str | None, *, pin_memory: bool = False) -> None:
        optimizer.gate.wait()
        tensors = [tensor for tensor in _state_tensors(optimizer) if tensor.untyped_storage().resizable()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self._file: IO[bytes] | None = None
        self._kept: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="optimizer_state_")  # noqa: SIM115 (held until load)
        for storage in storages.values():
            host = None
            if self._file is not None:
                self._file.write(_memory(_bytes_of(storage).cpu()))
            else:
                host = _bytes_of(storage).to("cpu", copy=True)
                host = host.pin_memory() if pin_memory and ds_comm.device.device_type() != "cpu" else host
            self._kept.append((storage, storage.nbytes(), host))
        if self._file is not None:
            self._file.flush()
        self._views: list[tuple[Tensor, torch.UntypedStorage, int, torch.Size, tuple[int, ...]]] = []
        for tensor in tensors:
            place = int(tensor.storage_offset()), tensor.size(), tensor.stride()
            self._views.append((tensor, storages[tensor.untyped_storage().data_ptr()], *place))
        for tensor in tensors:
            tensor.data = tensor.new_empty(0)
        for storage in storages.values():
            storage.resize_(0)
        optimizer.gate.hold(self.load)

    @property
    def nbytes(self) -> int:
        """Bytes that are elsewhere; 0 once they are back."""
        return sum(nbytes for _, nbytes, _ in self._kept)

    def load(self) -> None:
        """Bring everything back to the tensors it belongs to; again does nothing."""
        if self._file is not None:
            self._file.seek(0)
        for storage, nbytes, host in self._kept:
            storage.resize_(nbytes)
            target = _bytes_of(storage)
            if host is not None:
                target.copy_(host)
            elif self._file is not None:
                self._read(target)
        for tensor, storage, offset, size, stride in self._views:
            tensor.data = tensor.new_empty(0).set_(storage, offset, size, stride)
        self._kept, self._views = [], []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, target: Tensor) -> None:
        assert self._file is not None
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        if self._file.readinto(_memory(host)) != host.numel():  # type: ignore[attr-defined]
            raise OSError("the file of the offloaded optimizer state was cut short; load the last checkpoint")
        if host is not target:
            target.copy_(host)


def _state_tensors(optimizer: ds_zero.ZeroOptimizer) -> Iterator[Tensor]:
    """Everything in the optimizer's state that is as large as a parameter."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a tensor of bytes on the CPU. (A numpy view would make its storage impossible to free.)"""
    return memoryview((ctypes.c_char * flat.numel()).from_address(flat.data_ptr())).cast("B")


def _chosen(names: type[Name], value: Any, argument: str) -> Name:
    """The member of an enumeration; ValueError for anything else, and for "none"."""
    known = [name.value for name in names if name.value != "none"]
    if value not in known:
        raise ValueError(f"offload_states: {argument} has {value!r}; expected {' or '.join(known)}")
    return names(value)


class StateOffloading:
    """The engine's methods; see `DeepSpeedEngine`."""

    _config: ResolvedConfig
    optimizer: Any
    sharded: ds_zero.ShardedModel
    _offloaded: OffloadedState | None = None

    def offload_states(
        self,
        include: Iterable[OffloadStateTypeEnum | str] | None = None,
        device: OffloadDeviceEnum | str = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Free the memory of the optimizer's state until it is needed again, or `reload_states` is called.

        Args:
            include: of `OffloadStateTypeEnum`; all by default. Only optim_states moves, the others stay.
            device: cpu (nothing to do on a host without accelerator) or nvme: a file in
                `zero_optimization.offload_optimizer.nvme_path`, or else in the system's folder for temporary files.
            pin_memory: page-locked host memory.
            non_blocking: accepted; the call returns when the memory is free.

        Raises:
            ValueError: an unknown state or device. ZeroStateError: there is no optimizer. OSError: no room in files.
        """
        kinds = OffloadStateTypeEnum if include is None else include
        wanted = {_chosen(OffloadStateTypeEnum, kind, "include") for kind in kinds}
        where = _chosen(OffloadDeviceEnum, getattr(device, "type", device), "device")
        if not isinstance(self.optimizer, ds_zero.ZeroOptimizer):
            raise ds_zero.ZeroStateError("offload_states needs an optimizer; there are no states without one")
        staying = sorted(kind.value for kind in wanted - {OffloadStateTypeEnum.optim_states})
        if where is OffloadDeviceEnum.cpu and ds_comm.device.device_type() == "cpu":
            log_dist('offload_states: states are in host memory already; device="nvme" frees it', ranks=[0])
            return
        if staying and include is not None:
            log_dist(f"offload_states: {', '.join(staying)} stay where they are", ranks=[0])
        if OffloadStateTypeEnum.optim_states in wanted and not (self._offloaded and self._offloaded.nbytes):
            folder = self._offload_folder() if where is OffloadDeviceEnum.nvme else None
            self._offloaded = OffloadedState(self.optimizer, folder, pin_memory=pin_memory)

    def _offload_folder(self) -> str:
        section = self._config.zero_optimization.offload_optimizer
        return section.nvme_path if section is not None and section.nvme_path else tempfile.gettempdir()

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved; also done by the next step, save or load."""
        if self._offloaded is not None:
            self._offloaded.load()
            self._offloaded = None

    def empty_partition_cache(self) -> None:
        """Free parameters that stage 3 keeps gathered because they are used again soon; collective."""
        self.sharded.end_micro_batch()
