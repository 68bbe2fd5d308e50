"""Where the inputs of a checkpointed function wait for the backward pass.

Owns the pack/unpack pairs for `torch.autograd.graph.saved_tensors_hooks`. They see exactly what torch's checkpoint
saves, the tensor arguments, because what the function itself would save is dropped and recomputed.

- Offload: the argument is copied to host memory (page-locked under an accelerator) and back.
- Partition: the model-parallel ranks all have the same argument, so each keeps 1/size of it and the whole is gathered
  again in the backward pass. Without model parallelism there is nothing to divide, and partitioning does nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import ds_comm


class _Kept(NamedTuple):
    """One saved argument: what is left of it, and what the whole looked like."""

    data: torch.Tensor
    device: torch.device
    shape: torch.Size
    is_partition: bool


class ArgumentStorage:
    """Pack and unpack for `saved_tensors_hooks`.

    Args:
        to_cpu: keep arguments in host memory.
        group: model-parallel group over whose ranks floating arguments are divided; None divides nothing.
    """

    def __init__(self, to_cpu: bool, group: Any = None) -> None:
        self.to_cpu, self.group = to_cpu, group
        self.group_size = ds_comm.get_world_size(group) if group is not None else 1

    def pack(self, tensor: torch.Tensor) -> _Kept:
        """What to keep of an argument."""
        divide = self.group_size > 1 and tensor.is_floating_point() and tensor.numel() >= self.group_size
        data = self._own_part(tensor) if divide else tensor
        if self.to_cpu:
            data = self._on_host(data)
        return _Kept(data, tensor.device, tensor.shape, divide)

    def unpack(self, kept: _Kept) -> torch.Tensor:
        """The argument as it was, bit for bit."""
        data = kept.data.to(kept.device, non_blocking=True)
        if not kept.is_partition:
            return data
        whole = data.new_empty(data.numel() * self.group_size)
        ds_comm.all_gather_into_tensor(whole, data, group=self.group, label="activation partition")
        return whole[: kept.shape.numel()].view(kept.shape)

    def _own_part(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().reshape(-1)
        length = -(-flat.numel() // self.group_size)
        part = flat.new_zeros(length)
        own = flat[ds_comm.get_rank(self.group) * length :][:length]
        part[: own.numel()] = own
        return part

    @staticmethod
    def _on_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor.detach())
