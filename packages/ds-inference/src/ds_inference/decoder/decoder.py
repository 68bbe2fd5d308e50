"""`Decoder`: a model as data, and the forward pass over it.

Two ways compute the same: the *operations* of `forward` take any batch; a *program* (`ds_kernels.bind_decode`) takes
steps of one token for each of a few sequences and runs through all layers at once. A program is bound to one cache and
lives as long as that.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_comm import Communicator
from ds_inference.decoder.batch import Batch
from ds_inference.decoder.cache import KVCache
from ds_inference.decoder.forward import Forward
from ds_inference.decoder.parallel import Parallel
from ds_kernels import DecodeModel, DecodeProgram, KernelArgumentError, bind_decode

__all__ = ["Decoder"]

logger = logging.getLogger(__name__)

PROGRAM_ROWS = 32
"""Sequences of a step up to which a program is the faster way."""


class Decoder:
    """Made by `read_decoder`.

    Attributes:
        config: the model's Hugging Face configuration.
        max_positions: the longest sequence, prompt and answer; None: no limit.
        dtype, device: of the weights (of what is computed with, when they are quantised).
        communicator: the tensor-parallel group's; None: one rank has it all.
        activation_bits: of what goes into quantised layers; None: as it is.
        copied_nbytes: of a lent model's weights, what could not be views and is held a second time.
        fused: whether programs are used where they can be; set it to False for the operations alone.
    """

    def __init__(
        self,
        model: DecodeModel,
        *,
        config: Any = None,
        max_positions: int | None = None,
        parallel: Parallel | None = None,
        activation_bits: int | None = None,
        bound: Sequence[tuple[nn.Module, str, int]] = (),
        restore: Sequence[Callable[[], None]] = (),
        copied_nbytes: int = 0,
    ) -> None:
        self.copied_nbytes = copied_nbytes
        self._forward: Forward | None = Forward(model, activation_bits, parallel)
        self._bound, self._restore = list(bound), list(restore)
        self.config = config
        self.max_positions = max_positions
        weight = model.embedding
        assert isinstance(weight, Tensor)
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.communicator: Communicator | None = None if parallel is None else parallel.communicator
        self.activation_bits = activation_bits
        self.fused = self.communicator is None and self.device.type == "cpu"
        self._programs: weakref.WeakKeyDictionary[KVCache, DecodeProgram] = weakref.WeakKeyDictionary()

    @property
    def model(self) -> DecodeModel:
        """The decoder as data; RuntimeError after `revert`."""
        return self._computed.model

    @property
    def _computed(self) -> Forward:
        if self._forward is None:
            raise RuntimeError("this decoder was reverted; read the model again with read_decoder")
        return self._forward

    @property
    def vocab_size(self) -> int:
        """Tokens that logits are computed for, on all ranks together."""
        parallel = self._computed.parallel
        if parallel is not None and parallel.head_sizes is not None:
            return sum(parallel.head_sizes)
        return self.model.head.weight.shape[0]

    @torch.no_grad()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute new tokens: their keys and values go into the cache.

        Args:
            batch: what to compute.
            cache: of this decoder.

        Returns:
            fp32 logits [n, vocabulary] of the tokens of `batch.logits_at`, or [T, vocabulary] of all.

        Raises:
            RuntimeError: the decoder was reverted, or the model's parameters are elsewhere by now (looked at whenever
                something else than decoding is computed).
        """
        if self.fused and batch.cu_seqlens is None and 0 < len(batch.tokens) <= PROGRAM_ROWS:
            program = self._program(cache)
            if program is not None:
                inputs = (batch.tokens, batch.positions, batch.slots, batch.block_tables, batch.context_lens)
                logits = program(*inputs)  # its own buffer, which the next step writes over
                return logits.clone() if batch.logits_at is None else logits[batch.logits_at]
        if batch.cu_seqlens is not None:
            self._check_bound()
        return self._computed(batch, cache.k, cache.v)

    def _check_bound(self) -> None:
        """The decoder's weights are still the model's."""
        for module, key, place in self._bound:
            parameter = getattr(module, key)
            if parameter is None or parameter.data_ptr() != place:
                raise RuntimeError(
                    f"{type(module).__name__}.{key} was moved, cast or replaced since the model was read, and "
                    "this decoder has the old one; call revert() before such a change, and read_decoder again after it"
                )

    def _program(self, cache: KVCache) -> DecodeProgram | None:
        """The one bound to this cache; None: there cannot be any, which is told once."""
        program = self._programs.get(cache)
        if program is None:
            try:
                program = bind_decode(self.model, cache.k, cache.v, PROGRAM_ROWS, activation_bits=self.activation_bits)
            except KernelArgumentError as error:
                self.fused = False
                logger.warning("decoding runs operation by operation, not as one program: %s", error)
                return None
            self._programs[cache] = program
        return program

    def revert(self) -> None:
        """Give the model's parameters their own, separate storage back, to the bit; this decoder ends.

        Layers that were quantised stay so: their codes are what is given back.
        """
        self._programs.clear()
        self._bound.clear()
        self._forward = None  # else every fused weight would live until the last parameter has moved
        for restore in self._restore:
            restore()
        self._restore.clear()
