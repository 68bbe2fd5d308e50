"""`Decoder`: a model as data, and the forward pass over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_inference.decoder.batch import Batch
from ds_inference.decoder.cache import KVCache
from ds_inference.decoder.forward import forward
from ds_kernels.ops.decode.model import DecodeModel

__all__ = ["Decoder"]


class Decoder:
    """Made by `read_decoder`.

    Attributes:
        config: the model's Hugging Face configuration.
        max_positions: the longest sequence, prompt and answer; None: no limit.
        dtype, device: of the weights (of what is computed with, when they are quantised).
        communicator: the tensor-parallel group's; None: one rank has it all.
    """

    def __init__(
        self, model: DecodeModel, config: Any, max_positions: int | None, moved: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self._model: DecodeModel | None = model
        self._moved = list(moved)
        self.config = config
        self.max_positions = max_positions
        weight = model.embedding
        assert isinstance(weight, Tensor)
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.communicator: Any = None

    @property
    def model(self) -> DecodeModel:
        """The decoder as data; RuntimeError after `revert`."""
        if self._model is None:
            raise RuntimeError("this decoder was reverted; read the model again with read_decoder")
        return self._model

    @property
    def vocab_size(self) -> int:
        """Tokens that logits are computed for."""
        return self.model.head.weight.shape[0]

    @torch.no_grad()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute new tokens: their keys and values go into the cache.

        Args:
            batch: what to compute.
            cache: of this decoder.

        Returns:
            fp32 logits [n, vocabulary] of the tokens of `batch.logits_at`, or [T, vocabulary] of all.
        """
        return forward(self.model, batch, cache.k, cache.v)

    def revert(self) -> None:
        """Give the model's parameters their own, separate storage back, to the bit; this decoder ends."""
        if self._model is None:
            return
        self._model = None  # else every fused weight would live until the last parameter has moved
        for group in self._moved:
            for parameter in group:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._moved.clear()
