"""What a rank of a tensor-parallel group has to know about the others during a forward pass."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ds_comm import Communicator
from ds_inference.tp.communication import gather_features, sum_over_ranks

__all__ = ["Parallel"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Attributes:
    communicator: of the group.
    summed: ids of the projections of which each rank computes a part of the sum.
    first_token: where this rank's rows of the embedding begin; None: every rank has them all.
    head_sizes: tokens of each rank's part of the head; None: every rank has them all.
    """

    communicator: Communicator
    summed: frozenset[int]
    first_token: int | None
    head_sizes: tuple[int, ...] | None

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """[tokens, features], replicated."""
        if self.first_token is None:
            return torch.nn.functional.embedding(tokens, table)
        local = tokens - self.first_token
        elsewhere = (local < 0) | (local >= len(table))
        if not len(table):
            found = table.new_zeros(len(tokens), table.shape[1])
        else:
            found = torch.nn.functional.embedding(local.masked_fill(elsewhere, 0), table)
            found = found.masked_fill_(elsewhere[:, None], 0)
        return self.sum(found, "embedding")

    def sum(self, value: Tensor, label: str) -> Tensor:
        """The ranks' values added up, replicated."""
        return sum_over_ranks(value, self.communicator, label)

    def logits(self, value: Tensor) -> Tensor:
        """[tokens, vocabulary], replicated."""
        if self.head_sizes is None:
            return value
        return gather_features(value, self.head_sizes, self.communicator, "logits")
