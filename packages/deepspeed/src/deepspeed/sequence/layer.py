"""Attention over a sequence that is split over ranks (Ulysses), under upstream's names.

Each rank has a part of the sequence and all heads. `DistributedAttention` exchanges that for the whole sequence and a
part of the heads, calls any local attention, and exchanges the result back. Shapes are [batch, sequence, heads, size]
(`batch_dim_idx` 0) or [sequence, batch, heads, size] (1), as upstream.

Differences from upstream, both towards more: heads need not divide evenly, nor key-value heads reach the number of
ranks; and gradients are those of one rank, whatever divides (see `exchange`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
from deepspeed._lazy import explain_absent
from deepspeed.sequence.exchange import HeadPlan, Move, balanced, exchange, gather_lengths, spans

__all__ = ["DistributedAttention", "apply_rotary_pos_emb", "single_all_to_all"]

_HEADS_DIM = 2


def apply_rotary_pos_emb(t: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """Rotate the first `freqs_cos.shape[-1]` features of each head, halves against each other; the rest passes."""
    size = freqs_cos.shape[-1]
    turned, rest = t[..., :size], t[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * freqs_cos + torch.cat((-right, left), dim=-1) * freqs_sin
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)


def _move(input: Tensor, scatter_idx: int, batch_dim_idx: int, group: Any) -> Move:
    """The even or uneven move of one tensor: heads apart and sequence together, or the other way."""
    if batch_dim_idx not in (0, 1) or input.dim() < 3:
        raise ValueError(
            f"a tensor of shape {tuple(input.shape)} with batch_dim_idx {batch_dim_idx}: expected [batch, sequence,"
            " heads, ...] with 0, or [sequence, batch, heads, ...] with 1"
        )
    sequence = 1 - batch_dim_idx
    scatter, gather = (_HEADS_DIM, sequence) if scatter_idx >= _HEADS_DIM else (sequence, _HEADS_DIM)
    ranks = ds_comm.get_world_size(group)
    if input.shape[scatter] < ranks:
        raise ValueError(
            f"{input.shape[scatter]} {'heads' if scatter == _HEADS_DIM else 'tokens'} cannot be split over {ranks}"
            " ranks; use fewer sequence-parallel ranks, or DistributedAttention, which repeats key-value heads"
        )
    lengths = gather_lengths(group, input.shape[gather], input.device, "ulysses lengths")
    return Move(scatter, spans(balanced(input.shape[scatter], ranks)), gather, lengths)


class _SeqAllToAll:
    """Upstream's differentiable all-to-all: `_SeqAllToAll.apply(group, input, scatter_idx, gather_idx, batch_dim_idx)`.

    `scatter_idx` of 2 splits heads and joins the sequence, below 2 the other way. The further arguments are
    upstream's streams and have no effect.
    """

    @staticmethod
    def apply(
        group: Any,
        input: Tensor,
        scatter_idx: int,
        gather_idx: int,
        batch_dim_idx: int,
        stream: Any = None,
        handle: Any = None,
        type: str | None = None,
        is_fwd: bool = True,
        num_kv_heads: int | None = None,
    ) -> Tensor:
        return exchange(group, [input], [_move(input, scatter_idx, batch_dim_idx, group)], "ulysses")[0]


def single_all_to_all(
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: Any,
    async_op: bool = False,
    handle: Any = None,
    type: str | None = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """The exchange of `_SeqAllToAll` without gradient; complete on return, upstream's `async_op` has no effect."""
    with torch.no_grad():
        return _SeqAllToAll.apply(group, input, scatter_idx, gather_idx, batch_dim_idx)


class DistributedAttention(nn.Module):
    """Any attention, over sequences that the ranks of a group share.

    Args:
        local_attention: called as `local_attention(query, key, value, *args, **kwargs)` with whole sequences and this
            rank's heads; returns [.., .., heads, size] or [.., .., heads * size].
        sequence_process_group: the ranks that share each sequence.
        scatter_idx, gather_idx: upstream's; heads are dimension 2, the sequence is the one that `batch_dim_idx` leaves.
        sp_stream, num_kv_heads: upstream's, without effect: nothing runs aside, and key has its own number of heads.
        even_lengths: every rank has equally many tokens; False asks at each call, and any lengths will do.
    """

    def __init__(
        self,
        local_attention: Any,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        even_lengths: bool = True,
    ) -> None:
        super().__init__()
        if scatter_idx != _HEADS_DIM:
            raise ValueError(
                f"scatter_idx is {scatter_idx}, but heads are dimension {_HEADS_DIM} of [batch, sequence, heads, size]"
                " and of [sequence, batch, heads, size]; leave it out"
            )
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx
        self.even_lengths = even_lengths

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; collective over the group.

        Args:
            query, key, value: this rank's tokens, all heads; key and value may have fewer heads.
            batch_dim_idx: 0 for [batch, sequence, heads, size], 1 for [sequence, batch, heads, size].
            rotary_pos_emb: (cos, sin) of the whole sequence, [sequence, 1, 1, size], applied to query and key.
        Returns:
            What local_attention returns, for this rank's tokens and all heads.
        Raises:
            ValueError: fewer query heads than ranks, or shapes that do not go together.
        """
        if query.dim() != 4 or batch_dim_idx not in (0, 1) or key.shape != value.shape:
            raise ValueError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} with batch_dim_idx"
                f" {batch_dim_idx}: expected four dimensions, heads the third, and the batch first (0) or second (1)"
            )
        ranks, rank, at = ds_comm.get_world_size(self.spg), ds_comm.get_rank(self.spg), 1 - batch_dim_idx
        plan = HeadPlan.of(query.shape[_HEADS_DIM], key.shape[_HEADS_DIM], ranks)
        length = query.shape[at]
        even = (length,) * ranks
        lengths = even if self.even_lengths else gather_lengths(self.spg, length, query.device, "ulysses lengths")
        apart = [Move(_HEADS_DIM, heads, at, lengths) for heads in (plan.queries, plan.keys, plan.keys)]
        query, key, value = exchange(self.spg, [query, key, value], apart, "ulysses qkv")
        if rotary_pos_emb is not None:
            cos, sin = (_beside_heads(table, batch_dim_idx) for table in rotary_pos_emb)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        if (heads := plan.key_of_query(rank)) is not None:
            index = torch.tensor(heads, device=key.device)
            key, value = key.index_select(_HEADS_DIM, index), value.index_select(_HEADS_DIM, index)
        context = self.local_attn(query, key, value, *args, **kwargs)
        own = plan.num_queries()[rank]
        if context.dim() < 3 or context.shape[_HEADS_DIM] % own or context.shape[at] != sum(lengths):
            raise ValueError(
                f"local_attention returned {tuple(context.shape)} for {own} heads and {sum(lengths)} tokens; expected"
                " the shape of its query, or one with heads and their size merged"
            )
        width = context.shape[_HEADS_DIM] // own
        joined = tuple(width * heads for heads in plan.num_queries())
        return exchange(self.spg, [context], [Move(at, spans(lengths), _HEADS_DIM, joined)], "ulysses output")[0]


def _beside_heads(table: Tensor, batch_dim_idx: int) -> Tensor:
    """A [sequence, 1, 1, size] table as it multiplies [.., .., heads, size]."""
    return table.permute(1, 0, 2, 3) if batch_dim_idx == 0 else table


explain_absent(__name__)
