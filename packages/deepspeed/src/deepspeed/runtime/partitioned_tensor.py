"""A tensor of which every rank of a group holds one piece (upstream's `PartitionedTensor`).

The flat tensor is cut by `partition_uniform`: the first numel mod N pieces have one element more. `to_meta()` is
upstream's description, int64: [dimensions, *shape, pieces, rank, *offsets].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import ds_comm

__all__ = ["PartitionedTensor"]


class PartitionedTensor:
    """This rank's piece of a tensor, and what it takes to put the whole together.

    Args:
        tensor: the whole, equal on all ranks of the group; only the own piece is kept (a copy).
        group: None is the world.
        partition_meta: of another partitioned tensor; its offsets are used again.
    """

    def __init__(self, tensor: Tensor, group: Any = None, partition_meta: Tensor | None = None) -> None:
        count, rank = ds_comm.get_world_size(group), ds_comm.get_rank(group)
        offsets = _uniform(tensor.numel(), count)
        if partition_meta is not None:
            shape, offsets = _read(partition_meta, count)
            if math.prod(shape) != tensor.numel():
                raise ValueError(f"partition_meta is of shape {shape}, the tensor has {tensor.numel()} elements")
        piece = tensor.detach().reshape(-1)[offsets[rank] : offsets[rank + 1]].clone()
        self._set(piece, list(tensor.shape), offsets, group)

    def _set(self, piece: Tensor, shape: list[int], offsets: list[int], group: Any) -> None:
        self.local_data, self.orig_size, self.partition, self.group = piece, shape, offsets, group
        self.rank, self.num_parts = ds_comm.get_rank(group), len(offsets) - 1

    @classmethod
    def from_meta(
        cls, meta: Tensor, local_part: Tensor, group: Any, device: torch.device | str = "cpu"
    ) -> PartitionedTensor:
        """From `to_meta()` and this rank's piece; ValueError when they do not fit the group or each other."""
        shape, offsets = _read(meta, ds_comm.get_world_size(group))
        rank = ds_comm.get_rank(group)
        if local_part.numel() != offsets[rank + 1] - offsets[rank]:
            raise ValueError(
                f"the piece of rank {rank} has {local_part.numel()} elements, its description says "
                f"{offsets[rank + 1] - offsets[rank]}"
            )
        made = cls.__new__(cls)
        made._set(local_part.detach().reshape(-1).to(device), shape, offsets, group)
        return made

    def to_meta(self) -> Tensor:
        """int64: [dimensions, *shape, pieces, rank, *offsets]."""
        numbers = [len(self.orig_size), *self.orig_size, self.num_parts, self.rank, *self.partition]
        return torch.tensor(numbers, dtype=torch.int64, device=self.local_data.device)

    def data(self) -> Tensor:
        """The own piece, 1-D."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """Size of the own piece."""
        return self.local_data.size()

    def full_size(self) -> list[int]:
        """Shape of the whole."""
        return self.orig_size

    def full(self, device: torch.device | str | None = None) -> Tensor:
        """The whole tensor on every rank; collective."""
        piece = self.local_data if device is None else self.local_data.to(device)
        sizes = [stop - start for start, stop in zip(self.partition, self.partition[1:], strict=False)]
        longest = max(sizes)
        padded = piece.new_zeros(longest)
        padded[: piece.numel()] = piece
        found = piece.new_empty(longest * self.num_parts)
        ds_comm.all_gather_into_tensor(found, padded, group=self.group, label="PartitionedTensor")
        rows = found.view(self.num_parts, longest)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)]).view(self.orig_size)


def _uniform(numel: int, count: int) -> list[int]:
    size, extra = divmod(numel, count)
    return [part * size + min(part, extra) for part in range(count + 1)]


def _read(meta: Tensor, count: int) -> tuple[list[int], list[int]]:
    """(shape, offsets) of a description; ValueError when it is of another number of pieces."""
    numbers = [int(number) for number in meta.tolist()]
    shape, rest = numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
    if len(rest) != count + 3 or rest[0] != count:
        raise ValueError(f"the description is of {rest[:1]} pieces, the group has {count} ranks; expected as many")
    return shape, rest[2:]
