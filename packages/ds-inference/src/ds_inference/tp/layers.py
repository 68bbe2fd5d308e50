"""Layers of which each rank of a tensor-parallel group holds a part, for inference and training.

A **column**-parallel layer holds some of the outputs, a **row**-parallel one some of the inputs, the **vocabulary**
layers some of the tokens. `weight` and `bias` are this rank's part, ordinary parameters: a state dict has the local
part, `apply` knows how parts and whole belong together. Between a column and the row that reads it lies a *region* of
which every rank computes another part; outside of regions everything is replicated, to the bit.

Invariants: every rank of `communicator` calls the same layers in the same order; the bias of a row-parallel layer is
whole on every rank and added once, after the sum; gradients of replicated inputs are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_comm import Communicator
from ds_inference.tp.communication import copy_to_ranks, gather_features, sum_over_ranks
from ds_inference.tp.random import SplitRandom

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "SharedInput", "VocabParallelEmbedding", "VocabParallelHead"]


class SharedInput:
    """The input of column-parallel layers that read the same tensor (queries, keys, values; gate, up).

    Their gradients of it are added up on the rank first, so that one sum over ranks is enough.
    """

    def __init__(self, communicator: Communicator, readers: int, label: str) -> None:
        self.communicator, self.readers, self.label = communicator, readers, label
        self._held: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, value: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and value.requires_grad):
            return value
        if self._held is None or self._held[0] is not value:
            self._held, self._left = (value, copy_to_ranks(value, self.communicator, self.label)), self.readers
        copied = self._held[1]
        self._left -= 1
        if not self._left:
            self._held = None
        return copied

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        return SharedInput(self.communicator, self.readers, self.label)


class _ParallelLinear(nn.Module):
    """A linear layer with a part of the weight: [outputs, inputs], or [inputs, outputs] when `transposed` (Conv1D)."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        communicator: Communicator,
        *,
        label: str,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.communicator = communicator
        self.label = label
        self.transposed = transposed
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        self.in_features, self.out_features = int(in_features), int(out_features)

    def _product(self, value: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, self.weight.t() if self.transposed else self.weight, bias)

    def extra_repr(self) -> str:
        rank, size = self.communicator.rank, self.communicator.size
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, rank {rank} of {size}"


class ColumnParallelLinear(_ParallelLinear):
    """Some of the outputs of a linear layer: [..., inputs] replicated -> [..., local outputs].

    `shared`: what its input is read through, together with its siblings. `random`: opens the region's random numbers.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        communicator: Communicator,
        *,
        label: str,
        transposed: bool = False,
        shared: SharedInput | None = None,
        random: SplitRandom | None = None,
    ) -> None:
        super().__init__(weight, bias, communicator, label=label, transposed=transposed)
        self.shared = shared if shared is not None else SharedInput(communicator, 1, label)
        self.random = random

    def forward(self, input: Tensor) -> Tensor:
        if self.random is not None and self.training:
            self.random.enter()
        return self._product(self.shared(input), self.bias)


class RowParallelLinear(_ParallelLinear):
    """Some of the inputs of a linear layer: [..., local inputs] -> [..., outputs] replicated; collective."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        communicator: Communicator,
        *,
        label: str,
        transposed: bool = False,
        random: SplitRandom | None = None,
    ) -> None:
        super().__init__(weight, bias, communicator, label=label, transposed=transposed)
        self.random = random

    def forward(self, input: Tensor) -> Tensor:
        if self.random is not None and self.training:
            self.random.leave()
        total = sum_over_ranks(self._product(input, None), self.communicator, self.label)
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(nn.Module):
    """Some rows of an embedding: tokens [...], the same on every rank -> [..., width] replicated; collective.

    `embed_scale`: a factor of the result, as Gemma and Bart have it.
    """

    embed_scale: Tensor | float | None

    def __init__(
        self,
        weight: nn.Parameter,
        first: int,
        num_embeddings: int,
        communicator: Communicator,
        *,
        label: str,
        padding_idx: int | None = None,
        embed_scale: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.first = first
        self.num_embeddings, self.embedding_dim = num_embeddings, int(weight.shape[1])
        self.communicator = communicator
        self.label = label
        self.padding_idx = padding_idx
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = input - self.first
        elsewhere = (local < 0) | (local >= rows)
        if not rows:  # fewer rows than ranks
            found = self.weight.new_zeros(*input.shape, self.embedding_dim) + self.weight.sum()
        else:
            pad = None if self.padding_idx is None else self.padding_idx - self.first
            pad = pad if pad is not None and 0 <= pad < rows else None
            found = F.embedding(local.masked_fill(elsewhere, 0), self.weight, pad)
            found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        whole = sum_over_ranks(found, self.communicator, self.label)
        scale = self.embed_scale
        if scale is None:
            return whole
        return whole * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)

    def extra_repr(self) -> str:
        stop = self.first + self.weight.shape[0]
        return f"{self.num_embeddings}, {self.embedding_dim}, tokens {self.first} to {stop - 1}"


class VocabParallelHead(_ParallelLinear):
    """Some tokens of an output layer: [..., inputs] replicated -> logits of all tokens, replicated; collective.

    `sizes`: tokens per rank.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        sizes: Sequence[int],
        communicator: Communicator,
        *,
        label: str,
        transposed: bool = False,
    ) -> None:
        super().__init__(weight, bias, communicator, label=label, transposed=transposed)
        self.sizes = tuple(sizes)

    def forward(self, input: Tensor) -> Tensor:
        own = self._product(copy_to_ranks(input, self.communicator, self.label), self.bias)
        return gather_features(own, self.sizes, self.communicator, self.label)
