"""Serving with a model that is split over tensor-parallel ranks: the first rank leads, the others follow.

The leader has the clients, the requests, the scheduler and the sampler. What all ranks do together is the pass over the
layers and the copies of blocks, so before either the leader sends its numbers, and followers do what they are sent.

    core = LLM(model, tokenizer=tokenizer).core       # on every rank: the same model, split; the same options
    if rank == 0:
        with leading(core) as led:                    # AsyncLLM(led), or a server
            ...
    else:
        follow(core)                                  # until the leader is done

Vocabulary: an *order* is a header of numbers and, behind it, the numbers of a batch or the pairs of blocks.

Invariants: ranks compute the same orders in the same order; a leader that has nothing to do says so from time to time,
so that no rank is taken for missing; whoever is left by the others gets ds-comm's error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_comm import Communicator
from ds_inference.decoder import Batch, Decoder, KVCache
from ds_inference.errors import ConfigError
from ds_inference.serve.core import ServingCore

__all__ = ["follow", "leading"]

IDLE_SECONDS = 60.0
"""A leader says that it is there at least this often; ds-comm waits for ten minutes."""
_STOP, _IDLE, _FORWARD, _COPY = range(4)
_HEADER = 8


class _Leader:
    """The decoder and the cache of the first rank, which take the others along."""

    def __init__(self, decoder: Decoder, cache: KVCache, communicator: Communicator, idle_seconds: float) -> None:
        self._decoder, self._cache, self._communicator = decoder, cache, communicator
        self.device, self.vocab_size, self.max_positions = decoder.device, decoder.vocab_size, decoder.max_positions
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._keep_alive, args=(idle_seconds,), daemon=True)
        self._pulse.start()

    def forward(self, batch: Batch, cache: object) -> Tensor:
        """As the decoder's, on all ranks."""
        parts = [batch.tokens, batch.positions, batch.slots, batch.block_tables.flatten(), batch.context_lens]
        parts += [part for part in (batch.cu_seqlens, batch.logits_at) if part is not None]
        wanted = -1 if batch.logits_at is None else len(batch.logits_at)
        header = [_FORWARD, len(batch.tokens), *batch.block_tables.shape, int(batch.cu_seqlens is not None), wanted,
                  batch.max_seqlen]  # fmt: skip
        with self._lock:
            self._send(header, torch.cat([part.long() for part in parts]))
            return self._decoder.forward(batch, self._cache)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As the cache's, on all ranks."""
        with self._lock:
            self._send([_COPY, len(pairs)], torch.tensor(pairs, device=self.device).flatten())
            self._cache.copy(pairs)

    def close(self) -> None:
        """Let the followers go."""
        self._ended.set()
        self._pulse.join()
        with self._lock:
            self._send([_STOP])

    def _keep_alive(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            with self._lock:
                self._send([_IDLE])

    def _send(self, header: list[int], content: Tensor | None = None) -> None:
        first = torch.tensor([*header, *[0] * (_HEADER - len(header))], device=self.device)
        self._communicator.broadcast(first, 0, label="serving: order")
        if content is not None and len(content):
            self._communicator.broadcast(content, 0, label="serving: numbers")


@contextlib.contextmanager
def leading(core: ServingCore, idle_seconds: float = IDLE_SECONDS) -> Iterator[ServingCore]:
    """On the first rank: a core whose passes the other ranks follow until the end of the block.

    ConfigError when the core's decoder is not split over ranks, or this is not their first.
    """
    decoder, cache, communicator = _parts(core)
    if communicator.rank != 0:
        raise ConfigError(f"rank {communicator.rank} of the tensor-parallel group cannot lead; expected rank 0: follow")
    leader = _Leader(decoder, cache, communicator, idle_seconds)
    scheduler = core.scheduler
    try:
        yield ServingCore(leader, leader, scheduler.blocks, scheduler.limits, core.codec, core.eos_token_ids)
    finally:
        leader.close()


@torch.inference_mode()
def follow(core: ServingCore) -> None:
    """On every other rank: compute what the leader orders, until it is done.

    ConfigError when the core's decoder is not split over ranks, or this is their first; RankMissingError when the
    leader is gone.
    """
    decoder, cache, communicator = _parts(core)
    if communicator.rank == 0:
        raise ConfigError("rank 0 of the tensor-parallel group cannot follow; expected it to lead")
    while True:
        header = torch.zeros(_HEADER, dtype=torch.int64, device=decoder.device)
        communicator.broadcast(header, 0, label="serving: order")
        kind, *sizes = header.tolist()
        if kind == _STOP:
            return
        if kind == _FORWARD:
            decoder.forward(_received(sizes, decoder.device, communicator), cache)
        elif kind == _COPY:
            pairs = _numbers(2 * sizes[0], decoder.device, communicator).view(-1, 2).tolist()
            cache.copy([(source, target) for source, target in pairs])


def _numbers(count: int, device: torch.device, communicator: Communicator) -> Tensor:
    content = torch.empty(count, dtype=torch.int64, device=device)
    if count:
        communicator.broadcast(content, 0, label="serving: numbers")
    return content


def _received(sizes: Sequence[int], device: torch.device, communicator: Communicator) -> Batch:
    """The batch that the leader computes."""
    tokens, sequences, blocks, ragged, wanted, longest = sizes[:6]
    lengths = [tokens] * 3 + [sequences * blocks, sequences, (sequences + 1) * ragged, max(0, wanted)]
    parts = _numbers(sum(lengths), device, communicator).split(lengths)
    return Batch(
        tokens=parts[0],
        positions=parts[1],
        slots=parts[2],
        block_tables=parts[3].view(sequences, blocks).int(),
        context_lens=parts[4].int(),
        cu_seqlens=parts[5].int() if ragged else None,
        logits_at=parts[6] if wanted >= 0 else None,
        max_seqlen=longest,
    )


def _parts(core: ServingCore) -> tuple[Decoder, KVCache, Communicator]:
    decoder, cache = core.decoder, core.cache
    communicator = decoder.communicator if isinstance(decoder, Decoder) else None
    if not isinstance(decoder, Decoder) or not isinstance(cache, KVCache) or communicator is None:
        raise ConfigError(
            "this core's model is on one rank; expected one that apply_tensor_parallel has split. Serve it as it is"
        )
    return decoder, cache, communicator
