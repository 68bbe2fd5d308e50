"""Requests: what is asked for, how tokens are to be chosen, and how far the answer is.

A request's `tokens` are its prompt followed by what was generated; the keys and values of the first `num_computed` of
them are in the cache, in the blocks of its `block_table`. What is still to be computed is `num_pending`: 1 while it
decodes, more while its prompt is read or, after a preemption, read again.

Invariants: tokens only grow; `num_computed < len(tokens)` until it has finished; a request that is not running holds
no block and has computed nothing; `seed` is fixed from the start, so that a request draws the same tokens whatever
else is served beside it.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal

from ds_inference.errors import RequestError

__all__ = ["FinishReason", "Request", "RequestState", "SamplingParams"]

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end token or a stop string; length: a limit on tokens; abort: the caller gave up."""

MAX_LOGPROBS = 64
MAX_STOPS = 16
NO_PARENT = b""


class RequestState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Every value is checked; RequestError names it.

    The filters apply in transformers' order: repetition penalty, (then bias, presence and frequency,) temperature,
    top-k, top-p, min-p.
    """

    max_tokens: int | None = None
    """At most so many new tokens, >= 1; None: as many as the model's length allows."""
    min_tokens: int = 0
    """No end token before so many new tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: the most likely token, the filters below do not matter."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen (prompt included) are divided by it when positive, else multiplied; 0.01 to 100."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has, -2 to 2."""
    frequency_penalty: float = 0.0
    """The same for each time that the answer has them, -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), -100 to 100; a mapping may be given."""
    seed: int | None = None
    """Fixes what is drawn, 0 to 2**64 - 1; None draws a seed."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; at most 16, none empty. One string may be given as it is."""
    stop_token_ids: tuple[int, ...] = ()
    """Further end tokens, beside the model's own."""
    ignore_eos: bool = False
    """The model's own end tokens do not end the request."""
    logprobs: int | None = None
    """Log-probabilities of the token chosen and of so many most likely ones (0 to 64); None: none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, which is then computed whole, nothing of it being taken from the cache."""

    def __post_init__(self) -> None:
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        bias: object = self.logit_bias
        pairs = tuple(bias.items()) if isinstance(bias, Mapping) else _tuple("logit_bias", bias)
        object.__setattr__(self, "logit_bias", pairs)
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise RequestError(f"logit_bias has {pair!r}; expected pairs of a token and a number")
            _integer("a token of logit_bias", pair[0], 0, None)
            _real(f"logit_bias of token {pair[0]}", pair[1], -100, 100)
        _integer("max_tokens", self.max_tokens, 1, None, optional=True)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _real("temperature", self.temperature, 0, math.inf)
        _integer("top_k", self.top_k, -1, None)
        _real("top_p", self.top_p, 0, 1, above=True)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("seed", self.seed, 0, 2**64 - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; expected True or False")
        if len(self.stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop is {self.stop!r}; expected at most {MAX_STOPS} strings, none of them empty")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """The same from named values; RequestError names a value that there is not."""
        known = {one.name for one in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RequestError(f"sampling value {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer. The scheduler owns all fields but the first five."""

    request_id: str
    prompt: Sequence[int]
    """Token numbers, at least one."""
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = NO_PARENT
    """Prefixes are shared between requests of one salt only (say, of one tenant, or one adapter of the weights)."""

    state: RequestState = field(default=RequestState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    order: tuple[int, int] = field(default=(0, 0), init=False)
    """Place in the queue, kept for life: (arrival, branch), where forks of a request are its branches."""
    tokens: list[int] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    num_cached: int = field(default=0, init=False)
    """Tokens of the prompt that were found in the cache when the request first ran."""
    num_preemptions: int = field(default=0, init=False)
    max_length: int = field(default=0, init=False)
    """Tokens, prompt included, at which the request ends; set when it is queued."""
    block_table: list[int] = field(default_factory=list, init=False)
    digests: list[bytes] = field(default_factory=list, init=False)
    seed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError(f"request {self.request_id!r} has an empty prompt; expected at least one token")
        for token in self.prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**63:
                raise RequestError(
                    f"request {self.request_id!r}: token {token!r}; expected an int that is not negative"
                )
        self.prompt = tuple(self.prompt)
        self.tokens = list(self.prompt)
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def banned(self) -> tuple[int, ...]:
        """The tokens that may not be drawn next: the end tokens until `min_tokens` are there."""
        return self.end_tokens if self.num_output < self.params.min_tokens else ()

    @property
    def end_tokens(self) -> tuple[int, ...]:
        own = () if self.params.ignore_eos else self.eos_token_ids
        return (*own, *self.params.stop_token_ids)

    def append(self, token: int) -> FinishReason | None:
        """Take a generated token; the reason if the request ends with it (an end token stays in `tokens`)."""
        self.tokens.append(token)
        if token in self.end_tokens and self.num_output > self.params.min_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None

    def digest(self, index: int, block_size: int) -> bytes:
        """What names full block `index`: 128 bits of all tokens up to its end, chained, so each block is hashed once.

        The blocks before it must be full, and it too. BLAKE2b: two prefixes that differ do not meet in practice, not
        even when someone tries, which Python's own hash could not say.
        """
        for at in range(len(self.digests), index + 1):
            parent = self.digests[at - 1] if at else blake2b(self.cache_salt, digest_size=16).digest()
            content = array("q", self.tokens[at * block_size : (at + 1) * block_size])
            self.digests.append(blake2b(parent + content.tobytes(), digest_size=16).digest())
        return self.digests[index]


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise RequestError(f"{name} is {value!r}; expected a list")


def _integer(name: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r}; expected an int {bounds}{' or None' if optional else ''}")


def _real(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and (low < number if above else low <= number) and number <= high):
        lower = f"above {low}" if above else f"at least {low}"
        upper = "" if high == math.inf else f" and at most {high}"
        raise RequestError(f"{name} is {value!r}; expected a finite number {lower}{upper}")
