"""Bodies of requests: OpenAI's fields that are served, further sampling values, and what is refused by name.

Closed: a field that is neither served nor known to be harmless is an error that names it, because an option that is
ignored silently gives another answer than was asked for. Fields that this server does not implement are accepted with
the value that means "not used", since clients send those.

`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids` and `ignore_eos` go beyond OpenAI's (`extra_body`
of its client).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ds_inference.serve.core import MAX_CHOICES
from ds_inference.serve.request import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "Message", "StreamOptions", "TextPart"]

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of /v1/completions."""

TokenId = Annotated[int, Field(ge=0)]
TokenKey = Annotated[int, Field(strict=False)]
"""Keys of JSON are strings."""
Prompts = str | list[TokenId] | list[str] | list[list[TokenId]]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    """Strict: "5" or true is no number, as for OpenAI's server; what is meant by it is the client's to say."""


class StreamOptions(_Closed):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is padded."""


class _Sampling(_Closed):
    """What both kinds of requests share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # beyond OpenAI's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    # who asks, not what: no influence on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        """JSON can write half of a character (a lone surrogate), which no tokenizer takes and no answer can repeat."""
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object[error.start]!r} is half of a surrogate pair; expected text") from error
        return body

    @model_validator(mode="after")
    def _no_options_without_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    def unused(self) -> dict[str, Any]:
        """Fields that are not implemented, and the value besides null that means so."""
        return {}

    def refused(self) -> str | None:
        """The first field that asks for something that is not implemented."""
        for name, harmless in self.unused().items():
            value = getattr(self, name)
            if value is not None and value != harmless:
                return name
        return None

    def sampling(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """RequestError for values that cannot be."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=64)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def unused(self) -> dict[str, Any]:
        return super().unused() | {"best_of": self.n or 1, "suffix": ""}

    def params(self) -> SamplingParams:
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling(limit, self.logprobs, self.logprobs if self.echo else None)

    def prompts(self) -> list[str | list[int]]:
        """One or several, each text or token numbers."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        return [prompt] if one else prompt


class TextPart(_Closed):
    type: Literal["text"]
    text: str


class Message(_Closed):
    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template is given."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    continue_final_message: bool = False
    """Go on with the last message instead of answering it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_program(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A template is a program; one of the client's could run for ever."""
        if "chat_template" in given:
            raise ValueError("chat_template is the model's own; leave it out")
        return given

    @model_validator(mode="after")
    def _no_top_without_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def unused(self) -> dict[str, Any]:
        return super().unused() | {
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": self.parallel_tool_calls,
            "functions": [],
            "function_call": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "audio": None,
            "prediction": None,
            "reasoning_effort": None,
            "verbosity": None,
            "web_search_options": None,
        }

    def params(self) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)
