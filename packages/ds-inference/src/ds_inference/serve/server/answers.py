"""What is sent back: OpenAI's objects for completions and chat completions, whole or in chunks.

A `Format` turns completions and deltas into those objects; it knows no HTTP. Plain dictionaries, because they are
written once and read by nobody here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_inference.serve.outputs import Completion, Delta
from ds_inference.serve.sampler import Sampled
from ds_inference.serve.text import TextCodec

__all__ = ["ChatFormat", "CompletionFormat", "Format", "Usage", "error_object"]


def error_object(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Usage:
    """Tokens of one HTTP request."""

    prompt: int = 0
    output: int = 0
    cached: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Format:
    """Shared by both kinds: `kind` is the `object` of a whole answer, `chunk_kind` that of a part."""

    codec: TextCodec
    response_id: str
    model: str
    created: int
    with_usage: bool = False
    """Chunks carry a field `usage`, null but in the last."""
    kind = ""
    chunk_kind = ""

    def whole(self, choices: Sequence[Completion], usage: Usage) -> dict[str, Any]:
        return self._object(self.kind) | {
            "choices": [self.choice(one) for one in choices],
            "usage": usage.as_dict(),
        }

    def chunk(self, delta: Delta, index: int) -> dict[str, Any] | None:
        """What to send for a delta of choice `index`; None when there is nothing to say yet."""
        choice = self.part(delta, index)
        if not (delta.text or delta.logprobs or delta.last):
            return None
        return self._object(self.chunk_kind) | {"choices": [choice]} | ({"usage": None} if self.with_usage else {})

    def opening(self, index: int) -> dict[str, Any] | None:
        """What is sent of a choice before its first delta."""

    def last(self, usage: Usage) -> dict[str, Any]:
        return self._object(self.chunk_kind) | {"choices": [], "usage": usage.as_dict()}

    def choice(self, completion: Completion) -> dict[str, Any]:
        raise TypeError("a Format is one of its subclasses")

    def part(self, delta: Delta, index: int) -> dict[str, Any]:
        raise TypeError("a Format is one of its subclasses")

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}

    def _token(self, token: int) -> tuple[str, list[int]]:
        """A token as text and as bytes."""
        content = self.codec.token_bytes(token)
        return content.decode(errors="replace"), list(content)


@dataclass
class CompletionFormat(Format):
    """/v1/completions. `prompts`: the text that each choice repeats first (`echo`)."""

    echo: list[str] = field(default_factory=list)
    echo_scored: bool = False
    """The prompt comes with the log-probabilities of its tokens, in a choice's first delta."""
    kind = "text_completion"
    chunk_kind = "text_completion"
    _offsets: dict[int, int] = field(default_factory=dict)

    def choice(self, completion: Completion) -> dict[str, Any]:
        sampled = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
        return {
            "index": completion.index,
            "text": self._echoed(completion.index) + completion.text,
            "logprobs": self._logprobs(completion.index, sampled or None),
            "finish_reason": completion.finish_reason,
        }

    def part(self, delta: Delta, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": (self._echoed(index) if delta.prompt_logprobs else "") + delta.text,
            "logprobs": self._logprobs(index, (*delta.prompt_logprobs, *delta.logprobs) or None),
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self.echo or self.echo_scored:
            return None
        choice = {"index": index, "text": self._echoed(index), "logprobs": None, "finish_reason": None}
        return self._object(self.chunk_kind) | {"choices": [choice]} | ({"usage": None} if self.with_usage else {})

    def _echoed(self, index: int) -> str:
        return self.echo[index] if self.echo else ""

    def _logprobs(self, index: int, sampled: Sequence[Sampled] | None) -> dict[str, Any] | None:
        if sampled is None:
            return None
        tokens = [self._token(one.token)[0] for one in sampled]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in sampled],
            "top_logprobs": [None if one.logprob is None else self._top(one) for one in sampled],
            "text_offset": offsets,
        }

    def _top(self, sampled: Sampled) -> dict[str, float]:
        """The most likely tokens, and the one that was chosen. Of two tokens of one text the likelier is shown."""
        chosen = [] if sampled.logprob is None else [(sampled.token, sampled.logprob)]
        shown: dict[str, float] = {}
        for token, logprob in [*sampled.top, *chosen]:
            shown.setdefault(self._token(token)[0], logprob)
        return shown


@dataclass
class ChatFormat(Format):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, completion: Completion) -> dict[str, Any]:
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": completion.finish_reason,
        }

    def part(self, delta: Delta, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs or None),
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._object(self.chunk_kind) | {"choices": [choice]} | ({"usage": None} if self.with_usage else {})

    def _logprobs(self, sampled: Sequence[Sampled] | None) -> dict[str, Any] | None:
        if sampled is None:
            return None
        content = [
            self._one(one.token, one.logprob) | {"top_logprobs": [self._one(*pair) for pair in one.top]}
            for one in sampled
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": content}
