"""`Batch`: the tokens that one forward pass computes, and where their keys and values go."""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["Batch"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, one sequence after the other, without padding; tensors on the decoder's device.

    Attributes:
        tokens: [T] int64.
        positions: [T] int64, each token's place in its sequence.
        slots: [T] int64, block * block_size + offset where the token's key and value are written; -1: nowhere.
        block_tables: [S, P] int32, the blocks of each sequence's context in order.
        context_lens: [S] int32, keys of each sequence, those of its new tokens included. The queries of a sequence
            stand at the end of its context.
        cu_seqlens: [S + 1] int32, tokens cu_seqlens[i] to cu_seqlens[i + 1] are sequence i's; None: one each (T == S).
        logits_at: [n] int64, the tokens whose logits are wanted, as indices into T; None: all.
        max_seqlen: the most new tokens of a sequence.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor | None = None
    logits_at: Tensor | None = None
    max_seqlen: int = 1
