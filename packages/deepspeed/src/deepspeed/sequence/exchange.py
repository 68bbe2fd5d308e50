"""Exchanging parts of tensors between the ranks that share a sequence: the all-to-all of Ulysses.

    heads whole, sequence in parts   <->   sequence whole, heads in parts

Vocabulary
  span      (start, stop) of one rank on a tensor's dimension. The spans of a `HeadPlan`'s key-value heads may overlap:
            a head that the queries of several ranks need goes to each of them.
  Move      what happens to one tensor: its spans on `scatter_dim` go to the ranks, what arrives is joined along
            `gather_dim`. Several tensors travel as one message.

Invariants
- Plans are pure: they need no process group and are the same on every rank.
- The backward of an exchange is its adjoint: parts go back where they came from, overlapping spans are added in rank
  order, so an attention between two exchanges has the gradient of the attention that one rank computes.

Source: Jacobs et al., DeepSpeed Ulysses (2023), arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import ds_comm

__all__ = ["HeadPlan", "Move", "balanced", "exchange", "gather_lengths", "spans", "swap"]

Span = tuple[int, int]


def balanced(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` parts of `total`, the larger ones first."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def spans(sizes: Sequence[int]) -> tuple[Span, ...]:
    """Consecutive spans of these sizes."""
    ends = list(accumulate(sizes))
    return tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))


@dataclass(frozen=True)
class HeadPlan:
    """Which query and key-value heads each rank attends with."""

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    group: int
    """Query heads per key-value head of the whole attention."""

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, ranks: int) -> HeadPlan:
        """Balanced query heads, and the key-value heads that they need.

        Raises:
            ValueError: fewer query heads than ranks, or query heads that are no multiple of the key-value heads.
        """
        if num_heads < ranks:
            raise ValueError(
                f"{ranks} ranks share a sequence, but the attention has {num_heads} heads, and each rank needs one; use"
                f" a sequence_parallel_size of at most {num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads for {num_kv_heads} key-value heads; the former must be a multiple of the"
                " latter"
            )
        group = num_heads // num_kv_heads
        queries = spans(balanced(num_heads, ranks))
        return cls(queries, tuple((start // group, (stop - 1) // group + 1) for start, stop in queries), group)

    def num_queries(self) -> tuple[int, ...]:
        """Query heads of each rank."""
        return tuple(stop - start for start, stop in self.queries)

    def key_of_query(self, rank: int) -> list[int] | None:
        """For each query head of a rank its key-value head among those of the rank; None: the usual grouping."""
        (start, stop), (first, last) = self.queries[rank], self.keys[rank]
        found = [head // self.group - first for head in range(start, stop)]
        queries, keys = stop - start, last - first
        usual = queries % keys == 0 and found == [head // (queries // keys) for head in range(queries)]
        return None if usual else found


@dataclass(frozen=True)
class Move:
    """One tensor's part of an exchange: `scatter[rank]` goes to a rank, `gather[rank]` elements come from it."""

    scatter_dim: int
    scatter: tuple[Span, ...]
    gather_dim: int
    gather: tuple[int, ...]

    def arriving(self, shape: torch.Size, rank: int, source: int) -> tuple[int, ...]:
        """Shape of what `source` sends to `rank`, for a local tensor of `shape`."""
        sizes = list(shape)
        start, stop = self.scatter[rank]
        sizes[self.scatter_dim], sizes[self.gather_dim] = stop - start, self.gather[source]
        return tuple(sizes)

    def returning(self, shape: torch.Size, source: int) -> tuple[int, ...]:
        """Shape of the gradient that `source` sends back for a local tensor of `shape`."""
        sizes = list(shape)
        start, stop = self.scatter[source]
        sizes[self.scatter_dim] = stop - start
        return tuple(sizes)


def swap(
    group: Any, parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], label: str
) -> list[list[Tensor]]:
    """Send `parts[rank]` to each rank as one message; returns what each rank sent here, of `shapes[rank]`.

    All tensors have one dtype and device. Collective.
    """
    flat = torch.cat([part.reshape(-1) for rank in parts for part in rank])
    sends = [sum(part.numel() for part in rank) for rank in parts]
    numels = [[torch.Size(shape).numel() for shape in rank] for rank in shapes]
    receives = [sum(rank) for rank in numels]
    out = flat.new_empty(sum(receives))
    ds_comm.all_to_all_single(out, flat, receives, sends, group, label=label)
    found = []
    for message, sizes, rank in zip(out.split(receives), numels, shapes, strict=True):
        found.append([piece.view(tuple(shape)) for piece, shape in zip(message.split(sizes), rank, strict=True)])
    return found


class _Exchange(torch.autograd.Function):
    """See `exchange`."""

    @staticmethod
    def forward(ctx: Any, group: Any, moves: Sequence[Move], label: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.moves, ctx.label = group, moves, label
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ranks, mine = range(ds_comm.get_world_size(group)), ds_comm.get_rank(group)
        pairs = list(zip(tensors, moves, strict=True))
        parts = [[_part(tensor, move.scatter_dim, move.scatter[rank]) for tensor, move in pairs] for rank in ranks]
        shapes = [[move.arriving(tensor.shape, mine, rank) for tensor, move in pairs] for rank in ranks]
        found = swap(group, parts, shapes, label)
        return tuple(
            torch.cat([message[at] for message in found], dim=move.gather_dim) for at, move in enumerate(moves)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ranks = range(ds_comm.get_world_size(ctx.group))
        pairs = [(gradient, move, spans(move.gather)) for gradient, move in zip(gradients, ctx.moves, strict=True)]
        parts = [[_part(gradient, move.gather_dim, joined[rank]) for gradient, move, joined in pairs] for rank in ranks]
        moved = list(zip(ctx.moves, ctx.shapes, strict=True))
        shapes = [[move.returning(shape, rank) for move, shape in moved] for rank in ranks]
        found = swap(ctx.group, parts, shapes, f"{ctx.label}, backward")
        whole = []
        for at, (move, shape) in enumerate(moved):
            total = gradients[at].new_zeros(shape)
            for rank in ranks:
                start, stop = move.scatter[rank]
                total.narrow(move.scatter_dim, start, stop - start).add_(found[rank][at])
            whole.append(total.to(ctx.dtypes[at]))
        return None, None, None, *whole


def _part(tensor: Tensor, dim: int, span: Span) -> Tensor:
    return tensor.narrow(dim, span[0], span[1] - span[0])


def exchange(group: Any, tensors: Sequence[Tensor], moves: Sequence[Move], label: str) -> tuple[Tensor, ...]:
    """Exchange parts of tensors with the ranks of `group`, differentiably; collective, in backward too.

    Args:
        tensors: of any shapes, on one device; what differs in dtype travels in the widest.
        moves: one for each tensor, alike on every rank.
        label: what the ledger and errors call it.
    """
    result: tuple[Tensor, ...] = _Exchange.apply(  # type: ignore[no-untyped-call]
        group, tuple(moves), label, *tensors
    )
    return result


def gather_lengths(group: Any, length: int, device: torch.device, label: str) -> tuple[int, ...]:
    """Every rank's `length`; collective."""
    ranks = ds_comm.get_world_size(group)
    found = torch.empty(ranks, dtype=torch.int64, device=device)
    ds_comm.all_gather_into_tensor(found, torch.tensor([length], device=device), group, label=label)
    return tuple(found.tolist())
