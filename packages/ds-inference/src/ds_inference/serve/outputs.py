"""What serving gives back: finished answers, and the pieces they arrive in.

A **job** is what a caller asks for: one prompt, `n` **choices** (answers to it). A `Delta` is what one choice got since
its last delta; the deltas of a choice, joined, are its `Completion`.

Invariant: joined texts, tokens and log-probabilities do not depend on whether the job was streamed. An end token is in
the tokens and not in the text; a stop string is in neither the text nor taken from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_inference.serve.request import FinishReason
from ds_inference.serve.sampler import Sampled

__all__ = ["Completion", "Delta", "RequestOutput", "Timing"]


@dataclass
class Timing:
    """When things happened to a job, in seconds of `time.monotonic`."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class Delta:
    """What one choice of a job got: new text, new tokens, and the reason if it has ended."""

    job_id: str
    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Sampled, ...] = ()
    """One per token when the job asked for them."""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or end token that ended it."""
    error: Exception | None = None
    """The choice has failed with this; nothing follows."""
    num_cached: int = 0
    """Tokens of the prompt that were not computed again for it."""
    prompt_logprobs: tuple[Sampled, ...] = ()
    """In a choice's first delta, one per token of the prompt when the job asked for them; the first has none."""

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Completion:
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Sampled] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    prompt_logprobs: list[Sampled] | None = None

    def take(self, delta: Delta) -> None:
        """Join a delta of this choice."""
        self.text += delta.text
        self.token_ids.extend(delta.tokens)
        if delta.logprobs:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]
        if delta.prompt_logprobs:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        self.finish_reason, self.stop = delta.finish_reason, delta.stop


@dataclass
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    """None when it was given as token numbers."""
    prompt_token_ids: Sequence[int]
    outputs: list[Completion]
    timing: Timing
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def prompt_logprobs(self) -> list[Sampled] | None:
        """One per token of the prompt, the first without a probability; None: not asked for."""
        return self.outputs[0].prompt_logprobs

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text
