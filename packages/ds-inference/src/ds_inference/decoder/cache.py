"""`KVCache`: the keys and values of all layers in blocks.

A paged cache has many small blocks (16 tokens) that sequences share and give back; a static cache is the same thing
with one large block per sequence. Which block belongs to whom is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ds_kernels import DecodeModel

__all__ = ["KVCache"]


class _Sizes(Protocol):
    """What a cache has to know of a decoder."""

    dtype: torch.dtype
    device: torch.device

    @property
    def model(self) -> DecodeModel: ...


class KVCache:
    """Room for num_blocks * block_size tokens.

    Attributes:
        k, v: per layer [num_blocks, kv_heads, block_size, head_dim] of the decoder's dtype, on its device.
    """

    def __init__(self, decoder: _Sizes, num_blocks: int, block_size: int) -> None:
        """ValueError for sizes below 1."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"KVCache: {num_blocks} blocks of {block_size} tokens; expected at least 1 of 1")
        model = decoder.model
        shape = (2, len(model.layers), num_blocks, model.kv_heads, block_size, model.head_dim)
        # Zeros, not garbage: attention multiplies what lies behind a context's end by weights of zero.
        self._store = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.k = list(self._store[0])
        self.v = list(self._store[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._store.nbytes

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, destination)` each, in all layers; no block may be both."""
        if not pairs:
            return
        sources, destinations = (torch.tensor(side, device=self._store.device) for side in zip(*pairs, strict=True))
        self._store[:, :, destinations] = self._store[:, :, sources]

    @staticmethod
    def bytes_per_token(decoder: _Sizes) -> int:
        """What one token takes in all layers, keys and values."""
        model = decoder.model
        return 2 * len(model.layers) * model.kv_heads * model.head_dim * decoder.dtype.itemsize
