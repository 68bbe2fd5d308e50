"""A pretend model and tokenizer: what serving does with them can be known without one.

The cache holds, in each slot, the token whose key would be there; the pretend model reads the text of every sequence
from it, through the block table, and only then decides what comes next. So a slot that was shared, copied, freed or
written wrongly shows in the answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_inference import Batch, BlockManager, SamplingParams, SchedulerLimits, ServingCore
from ds_inference.errors import RequestError

VOCABULARY = 258
END = 256
NOTHING = 257
"""A token without text."""

Next = Callable[[list[int]], int]


def scrambled(text: list[int]) -> int:
    """A letter or the end, decided by all of the text."""
    number = random.Random(repr(text)).randrange(30)
    return END if number == 29 else ord("a") + number % 26


def alphabet(text: list[int]) -> int:
    """a, b, ..., z, the end; whatever came before."""
    last = text[-1]
    if last == ord("z"):
        return END
    return last + 1 if ord("a") <= last < ord("z") else ord("a")


class FakeCache:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tokens = torch.full((num_blocks, block_size), -1)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.tokens[target] = self.tokens[source]


class FakeDecoder:
    """Its most likely next token is what `following` says of the text so far."""

    vocab_size = VOCABULARY
    max_positions = None
    device = torch.device("cpu")

    def __init__(self, following: Next = scrambled) -> None:
        self.following = following
        self.seconds = 0.0
        """What a pass takes."""
        self.failing: Exception | None = None
        self.broken: Callable[[list[int]], bool] = lambda text: False
        """Texts for which the logits are NaN."""
        self.gate = threading.Event()
        self.gate.set()
        self.num_calls = 0

    def forward(self, batch: Batch, cache: FakeCache) -> Tensor:
        self.gate.wait()
        if self.seconds:
            time.sleep(self.seconds)
        if self.failing is not None:
            raise self.failing
        self.num_calls += 1
        size = cache.tokens.shape[1]
        cache.tokens.view(-1)[batch.slots] = batch.tokens
        count = len(batch.context_lens)
        starts = list(range(count + 1)) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        assert starts[-1] == len(batch.tokens) == len(batch.positions) == len(batch.slots)
        rows = []
        wanted = set(range(starts[-1]) if batch.logits_at is None else batch.logits_at.tolist())
        for at in range(count):
            length = int(batch.context_lens[at])
            table = batch.block_tables[at, : -(-length // size)].long()
            text = cache.tokens[table].view(-1)[:length].tolist()
            assert min(text) >= 0, f"read a slot that was never written: {text}"
            assert batch.positions[starts[at] : starts[at + 1]].tolist() == list(
                range(length - starts[at + 1] + starts[at], length)
            )
            rows += [
                self._row(text[: length - (starts[at + 1] - 1 - place)])
                for place in range(starts[at], starts[at + 1])
                if place in wanted
            ]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def _row(self, text: list[int]) -> Tensor:
        row = torch.zeros(self.vocab_size)
        row[torch.tensor([(17 * sum(text) + 31 * step) % 250 for step in range(5)])] += torch.tensor([1.0, 2, 3, 2, 1])
        row[self.following(text)] += 8
        return row * torch.nan if self.broken(text) else row


class FakeCodec:
    """Tokens are bytes."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def chat(self, messages: Sequence[Mapping[str, Any]], *, continue_last: bool, options: Mapping[str, Any]) -> str:
        if any(message["role"] == "nobody" for message in messages):
            raise RequestError("the template knows no role 'nobody'")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def make_core(
    following: Next = scrambled,
    *,
    num_blocks: int = 256,
    block_size: int = 4,
    prefix_caching: bool = True,
    codec: FakeCodec | None = None,
    **limits: int,
) -> ServingCore:
    """A core on the pretend model; its tokenizer is `FakeCodec` unless another is given."""
    wanted = {"max_length": 256, "max_tokens_per_step": 32, "max_running": 8, **limits}
    return ServingCore(
        FakeDecoder(following),
        FakeCache(num_blocks, block_size),
        BlockManager(num_blocks, block_size, prefix_caching=prefix_caching),
        SchedulerLimits(**wanted),
        FakeCodec() if codec is None else codec,
        (END,),
    )


def alone(prompt: Sequence[int], max_tokens: int, following: Next = scrambled) -> list[int]:
    """The greedy answer, end token included."""
    text = list(prompt)
    while len(text) < len(prompt) + max_tokens and (len(text) == len(prompt) or text[-1] != END):
        text.append(following(text))
    return text[len(prompt) :]


def greedy(max_tokens: int | None = None, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **values)
