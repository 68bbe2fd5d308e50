"""The ASGI application: routes, checks, and the way of a request through the engine.

    POST /v1/completions, /v1/chat/completions     GET /v1/models, /v1/models/NAME, /health, /metrics

Every error is OpenAI's error object: 400 for what cannot be served as it is (the text names the field), 401 without the
key, 404 for another model or path, 408 for a body that does not come, 413 for too large a one, 429 while the queue is
full, 500 for a failed computation, 503 while the engine shuts down or is dead, 504 when the time for a request is over.

Invariants: a response that ends, in whatever way, leaves no job behind; nothing of a client's text is logged.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ds_inference.errors import CapacityError, RequestError
from ds_inference.serve.async_engine import AsyncLLM, JobStream
from ds_inference.serve.outputs import Completion, Delta
from ds_inference.serve.request import SamplingParams
from ds_inference.serve.server.answers import ChatFormat, CompletionFormat, Format, Usage, error_object
from ds_inference.serve.server.metrics import CONTENT_TYPE, ServerMetrics
from ds_inference.serve.server.middleware import Gate
from ds_inference.serve.server.schema import ChatRequest, CompletionRequest
from ds_inference.serve.text import TextCodec

__all__ = ["ServerLimits", "build_app"]

Body = TypeVar("Body", CompletionRequest, ChatRequest)
RETRY_SECONDS = "1"


@dataclass(frozen=True)
class ServerLimits:
    """What the HTTP side allows; the engine has limits of its own."""

    body_nbytes: int = 4 << 20
    body_seconds: float = 30.0
    """For a body to arrive."""
    request_seconds: float = 600.0
    """From a request's arrival to the end of its answer."""
    prompts: int = 128
    """In one request."""


@dataclass
class _Task:
    """One HTTP request on its way: the jobs of its prompts, and how to answer."""

    format: Format
    jobs: list[JobStream]
    n: int
    params: SamplingParams
    deadline: float
    usage: Usage = field(default_factory=Usage)

    def close(self) -> None:
        for job in self.jobs:
            job.close()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice, delta) of all jobs as they come; TimeoutError when the time is over, or what went wrong."""
        arrived: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

        async def follow(at: int, job: JobStream) -> None:
            try:
                async for delta in job:
                    arrived.put_nowait((at * self.n + delta.index, delta))
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(follow(at, job)) for at, job in enumerate(self.jobs)]
        try:
            left = len(tasks)
            while left:
                item = await asyncio.wait_for(arrived.get(), max(0.0, self.deadline - time.monotonic()))
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    self._count(*item)
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _count(self, index: int, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        self.usage.output += len(delta.tokens)
        if delta.last and index % self.n == 0:
            self.usage.cached += delta.num_cached


class _EventStream(StreamingResponse):
    """Server-sent events whose jobs end with the response, however it ends."""

    def __init__(self, task: _Task, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (ClientDisconnect, OSError):
            pass  # the client is gone, and with it who could be told
        finally:
            self._task.close()


class Server:
    """The handlers, around one engine that serves one model under one name."""

    def __init__(self, engine: AsyncLLM, codec: TextCodec, model: str, limits: ServerLimits) -> None:
        self.engine = engine
        self.model = model
        self.limits = limits
        self.metrics = ServerMetrics(engine)
        self._codec = codec
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionRequest)
        prompts = body.prompts()
        if not 1 <= len(prompts) <= self.limits.prompts:
            raise _bad(f"{len(prompts)} prompts; expected 1 to {self.limits.prompts}", "prompt")
        tokens = [
            await asyncio.to_thread(self._codec.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        n = body.n or 1
        echo = []
        if body.echo:
            for numbers in tokens:  # numbers that no tokenizer has are refused before one looks at them
                self.engine.core.check(numbers, body.params(), n)
            for prompt in prompts:
                echo += [prompt if isinstance(prompt, str) else self._codec.decode(prompt)] * n
        form = CompletionFormat(*self._identity("cmpl", body), echo=echo, echo_scored=body.logprobs is not None)
        return await self._answer(request, body, tokens, body.params(), form)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatRequest)
        messages = [message.plain() for message in body.messages]

        def encode() -> list[int]:
            text = self._codec.chat(
                messages, continue_last=body.continue_final_message, options=body.chat_template_kwargs
            )
            return self._codec.encode(text, special=False)

        tokens = await asyncio.to_thread(encode)
        return await self._answer(request, body, [tokens], body.params(), ChatFormat(*self._identity("chatcmpl", body)))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    async def health(self, request: Request) -> Response:
        state = self.engine.state
        return JSONResponse({"status": "ok" if state == "running" else state}, 200 if state == "running" else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The request's body, read within the limits and checked."""
        if self.engine.state in ("draining", "closed"):
            raise _refusal(503, "the server is shutting down", "server_error", headers=_retry())
        if self.engine.state == "dead":
            raise _refusal(503, "the engine has failed; restart the server", "server_error")
        try:
            content = await asyncio.wait_for(self._read(request), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            text = f"the body did not come within {self.limits.body_seconds:g} s"
            raise _refusal(408, text) from error
        try:
            body = kind.model_validate(json.loads(content))
        except ValidationError as error:
            raise _bad(*_first_error(error)) from error
        except (ValueError, RecursionError) as error:
            raise _bad(f"the body is not JSON: {error}", None) from error
        self._check_model(body.model)
        if name := body.refused():
            raise _bad(f"{name} is not supported by this server with this value; leave it out", name, "unsupported")
        return body

    async def _read(self, request: Request) -> bytes:
        limit = self.limits.body_nbytes
        declared = request.headers.get("content-length", "0")
        size = int(declared) if declared.isdecimal() else 0
        parts: list[bytes] = []
        too_large = _refusal(413, f"the body is larger than {limit} bytes, the server's limit")
        if size > limit:
            raise too_large
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        form: Format,
    ) -> Response:
        n = body.n or 1
        task = _Task(form, [], n, params, time.monotonic() + self.limits.request_seconds)
        await self._submit(task, prompts, stream=bool(body.stream))
        task.usage.prompt = sum(len(tokens) for tokens in prompts)
        if body.stream:
            return _EventStream(task, self._events(task, body.stream_options is not None
                                                   and body.stream_options.include_usage))  # fmt: skip
        return await self._whole(request, task)

    async def _submit(self, task: _Task, prompts: Sequence[Sequence[int]], stream: bool) -> None:
        """Take all prompts, in one turn of the engine, or none: the first refusal is raised."""
        for tokens in prompts:
            self.engine.core.check(tokens, task.params, task.n)
        admitted: dict[int, JobStream] = {}

        async def admit(at: int, tokens: Sequence[int]) -> None:
            admitted[at] = await self.engine.submit(tokens, task.params, n=task.n, stream=stream)

        try:
            results = await asyncio.gather(*map(admit, range(len(prompts)), prompts), return_exceptions=True)
            for result in results:
                if result is not None:
                    raise result
        except BaseException:
            for job in admitted.values():
                job.close()
            raise
        task.jobs = [admitted[at] for at in range(len(prompts))]

    async def _whole(self, request: Request, task: _Task) -> Response:
        """The complete answer; given up when the client is gone."""
        choices = [Completion(index) for index in range(len(task.jobs) * task.n)]

        async def collect() -> None:
            async for index, delta in task.deltas():
                choices[index].take(delta)

        work = asyncio.create_task(collect())
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it; the log says so
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            task.close()
        self._observe(task, [len(choice.token_ids) for choice in choices])
        return JSONResponse(task.format.whole(choices, task.usage))

    async def _events(self, task: _Task, with_usage: bool) -> AsyncIterator[bytes]:
        task.format.with_usage = with_usage
        lengths = [0] * (len(task.jobs) * task.n)
        try:
            for index in range(len(lengths)):
                if opening := task.format.opening(index):
                    yield _event(opening)
            async for index, delta in task.deltas():
                lengths[index] += len(delta.tokens)
                if chunk := task.format.chunk(delta, index):
                    yield _event(chunk)
            if with_usage:
                yield _event(task.format.last(task.usage))
            self._observe(task, lengths)
        except Exception as error:  # the status has been sent: the error can only be an event
            yield _event(_failure(error)[1])
        yield b"data: [DONE]\n\n"

    def _observe(self, task: _Task, lengths: list[int]) -> None:
        for at, job in enumerate(task.jobs):
            self.metrics.finished(job.timing, max(lengths[at * task.n : (at + 1) * task.n]))

    def _identity(self, prefix: str, body: CompletionRequest | ChatRequest) -> tuple[TextCodec, str, str, int]:
        return self._codec, f"{prefix}-{uuid.uuid4().hex}", body.model, int(time.time())

    def _model_object(self) -> dict[str, Any]:
        limit = self.engine.core.scheduler.limits.max_length
        return {
            "id": self.model,
            "object": "model",
            "created": self._created,
            "owned_by": "ds-inference",
            "max_model_len": limit,
        }

    def _check_model(self, name: str) -> None:
        if name != self.model:
            text = f"the model {name!r} does not exist; this server has {self.model!r}"
            raise _refusal(404, text, code="model_not_found", param="model")


def build_app(
    engine: AsyncLLM,
    *,
    model: str,
    api_keys: Sequence[str] = (),
    limits: ServerLimits | None = None,
) -> Starlette:
    """The application that serves `engine`, which must have been started, under the name `model`.

    `api_keys`: one of them is asked for (`Authorization: Bearer KEY`) on /v1/*; none: no key is.
    RequestError when the engine has no tokenizer.
    """
    codec = engine.core.codec
    if codec is None:
        raise RequestError("a server needs a tokenizer; build the engine with tokenizer=...")
    server = Server(engine, codec, model, limits or ServerLimits())
    routes = [
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/health", server.health),
        Route("/metrics", server.show_metrics),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Response]] = {
        HTTPException: _http_error,
        RequestError: _known_error,
        CapacityError: _known_error,
        asyncio.TimeoutError: _known_error,
        ClientDisconnect: lambda request, error: Response(status_code=499),
        Exception: _known_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(Gate, api_keys=api_keys, metrics=server.metrics, paths=[route.path for route in routes])
    return app


def _failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for what went wrong inside."""
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "prompt of" in str(error) else None
        return 400, error_object(str(error), "invalid_request_error", code)
    if isinstance(error, CapacityError):
        status = 503 if "shut" in str(error) else 429
        return status, error_object(str(error), "server_error" if status == 503 else "rate_limit_error", "overloaded")
    if isinstance(error, asyncio.TimeoutError):
        return 504, error_object("the time for a request is over (the server's limit)", "timeout_error", "timeout")
    return 500, error_object(f"the computation failed: {type(error).__name__}: {error}", "server_error")


def _known_error(request: Request, error: Exception) -> Response:
    status, body = _failure(error)
    return JSONResponse(body, status, _retry() if status in (429, 503) else None)


def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    detail = getattr(error, "detail", str(error))
    if not isinstance(detail, dict):
        text = f"{request.method} {request.url.path}: {detail}"
        detail = error_object(text, "invalid_request_error")
    return JSONResponse(detail, status, getattr(error, "headers", None))


def _refusal(
    status: int,
    text: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> HTTPException:
    """An exception that `_http_error` answers with OpenAI's error object."""
    detail: Any = error_object(text, kind, code, param)
    return HTTPException(status, detail, headers)


def _bad(text: str, param: str | None, code: str | None = None) -> HTTPException:
    return _refusal(400, text, code=code, param=param)


_BRANCH = re.compile(r"(str|int|float|bool)$|(list|dict|tuple)\[|function-|constrained-")


def _first_error(error: ValidationError) -> tuple[str, str | None]:
    """Text and field of the first thing wrong with a body."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A union's branches ("prompt.list[int]") are not fields of the client's.
    place = ".".join(str(part) for part in first["loc"] if not _BRANCH.match(str(part)))
    if first["type"] == "extra_forbidden":
        return f"{place} is not a field that this server knows", place
    return f"{place or 'body'}: {first['msg']}", place or None


def _retry() -> dict[str, str]:
    return {"Retry-After": RETRY_SECONDS}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
