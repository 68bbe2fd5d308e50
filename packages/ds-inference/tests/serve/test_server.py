"""The HTTP server, over real sockets, by the official client and by hand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import http.client
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_fakes import FakeDecoder, alone, alphabet, make_core, scrambled

from ds_inference import AsyncLLM, ServingCore

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from ds_inference.serve.server.app import ServerLimits, build_app  # noqa: E402
from ds_inference.serve.server.run import DrainingServer, main, parse_args  # noqa: E402

pytestmark = pytest.mark.serve_extra
KEY = "secret-key"


class Running:
    """A server in a thread, and clients of it."""

    def __init__(self, core: ServingCore, **limits: Any) -> None:
        import uvicorn

        self.core = core
        assert isinstance(core.decoder, FakeDecoder)
        self.decoder = core.decoder
        self.engine = AsyncLLM(core)
        app = build_app(self.engine, model="pretend", api_keys=["other", KEY], limits=ServerLimits(**limits))
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        self.server = DrainingServer(config, self.engine, drain_seconds=20)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._socket]))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.decoder.gate.set()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Authorization": f"Bearer {KEY}", **headers})
        return self._send(request)

    def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self._send(urllib.request.Request(self.url + path, headers=headers))

    def _send(self, request: urllib.request.Request) -> tuple[int, Any, dict[str, str]]:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                content, status, headers = response.read(), response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            content, status, headers = error.read(), error.code, dict(error.headers)
        try:
            return status, json.loads(content), headers
        except ValueError:
            return status, content.decode(), headers

    def wait_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.core.has_work or self.engine.num_jobs:
            assert time.monotonic() < deadline, "a job was left behind"
            time.sleep(0.005)
        blocks = self.core.scheduler.blocks
        assert blocks.num_free == blocks.num_blocks


@contextlib.contextmanager
def running(core: ServingCore, **limits: Any) -> Iterator[Running]:
    server = Running(core, **limits)
    try:
        yield server
        server.wait_idle()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(make_core(scrambled)) as made:
        yield made


@pytest.fixture(scope="module")
def letters() -> Iterator[Running]:
    with running(make_core(alphabet)) as made:
        yield made


def text_of(prompt: str, max_tokens: int) -> str:
    return bytes(token for token in alone(list(prompt.encode()), max_tokens) if token < 256).decode()


class TestCompletions:
    def test_whole(self, server: Running) -> None:
        made = server.client.completions.create(model="pretend", prompt="hello there", max_tokens=12, temperature=0)
        assert made.choices[0].text == text_of("hello there", 12)
        assert made.object == "text_completion"
        assert made.usage is not None
        assert made.usage.prompt_tokens == 11
        assert made.usage.completion_tokens == len(alone(list(b"hello there"), 12))

    def test_batch_of_prompts_choices_and_echo(self, server: Running) -> None:
        made = server.client.completions.create(
            model="pretend", prompt=["one", "two"], max_tokens=5, temperature=0, n=2, echo=True
        )
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        expected = [prompt + text_of(prompt, 5) for prompt in ("one", "one", "two", "two")]
        assert [choice.text for choice in made.choices] == expected

    def test_echo_with_logprobs(self, server: Running) -> None:
        def ask(stream: bool) -> Any:
            return server.client.completions.create(
                model="pretend", prompt=["one prompt", "t"], max_tokens=4, temperature=0, echo=True, logprobs=2,
                stream=stream, n=2,
            )  # fmt: skip

        whole = ask(False)
        for choice, prompt in zip(whole.choices, ("one prompt", "one prompt", "t", "t"), strict=True):
            found = choice.logprobs
            assert choice.text == prompt + text_of(prompt, 4) == "".join(found.tokens)
            assert found.text_offset == list(range(len(found.tokens)))
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            assert all(value < 0 for value in found.token_logprobs[1:])
            assert all(set(text) <= {*top} and len(top) in (2, 3)
                       for text, top in zip(found.tokens[1:], found.top_logprobs[1:], strict=True))  # fmt: skip
        texts, tokens, values = ([""] * 4, [[] for _ in range(4)], [[] for _ in range(4)])
        for chunk in ask(True):
            for part in chunk.choices:
                texts[part.index] += part.text
                if part.logprobs is not None:
                    tokens[part.index] += part.logprobs.tokens
                    values[part.index] += part.logprobs.token_logprobs
        assert texts == [choice.text for choice in whole.choices]
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert [value[1:] for value in values] == [
            pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5) for choice in whole.choices
        ]

    def test_tokens_as_prompts(self, server: Running) -> None:
        one = server.client.completions.create(model="pretend", prompt=list(b"abc"), max_tokens=4, temperature=0)
        two = server.client.completions.create(
            model="pretend", prompt=[list(b"abc"), list(b"abd")], max_tokens=4, temperature=0
        )
        assert [choice.text for choice in two.choices] == [text_of("abc", 4), text_of("abd", 4)]
        assert one.choices[0].text == text_of("abc", 4)

    def test_stream_with_usage(self, server: Running) -> None:
        stream = server.client.completions.create(
            model="pretend", prompt=["x1", "x2"], max_tokens=9, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        texts, reasons, usages = {0: "", 1: ""}, {}, []
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        assert texts == {0: text_of("x1", 9), 1: text_of("x2", 9)}
        assert set(reasons.values()) <= {"stop", "length"}
        assert usages[:-1] == [None] * (len(usages) - 1)
        assert usages[-1].prompt_tokens == 4

    def test_stop_seed_and_further_values(self, letters: Running) -> None:
        made = letters.client.completions.create(model="pretend", prompt="-", max_tokens=20, temperature=0, stop="de")
        assert (made.choices[0].text, made.choices[0].finish_reason) == ("abc", "stop")
        drawn = [
            letters.client.completions.create(
                model="pretend", prompt="-", max_tokens=8, temperature=2, seed=7,
                extra_body={"top_k": 40, "ignore_eos": True, "min_p": 0.001, "repetition_penalty": 1.1},
            ).choices[0].text
            for _ in range(2)
        ]  # fmt: skip
        assert drawn[0] == drawn[1]

    def test_bias_and_penalties(self, letters: Running) -> None:
        made = letters.client.completions.create(
            model="pretend", prompt="-", max_tokens=3, temperature=0, logit_bias={str(ord("q")): 50}, n=1,
            frequency_penalty=2, presence_penalty=-1,
        )  # fmt: skip
        assert made.choices[0].text == "qqq"

    @pytest.mark.parametrize("stream", [False, True])
    def test_logprobs(self, letters: Running, stream: bool) -> None:
        made = letters.client.completions.create(
            model="pretend", prompt="-", max_tokens=3, temperature=0, logprobs=2, stream=stream
        )
        parts = [chunk.choices[0].logprobs for chunk in made] if stream else [made.choices[0].logprobs]
        assert [token for part in parts for token in part.tokens] == ["a", "b", "c"]
        assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2]
        assert all(value < 0 for part in parts for value in part.token_logprobs)
        assert all(len(top) == 2 for part in parts for top in part.top_logprobs)


class TestChat:
    MESSAGES = ({"role": "system", "content": "short"}, {"role": "user", "content": "hi"})
    PROMPT = "system: short\nuser: hi\n"

    def test_whole(self, server: Running) -> None:
        made = server.client.chat.completions.create(
            model="pretend", messages=list(self.MESSAGES), max_completion_tokens=10, temperature=0
        )
        assert made.choices[0].message.content == text_of(self.PROMPT, 10)
        assert made.choices[0].message.role == "assistant"

    def test_stream(self, server: Running) -> None:
        stream = server.client.chat.completions.create(
            model="pretend", messages=list(self.MESSAGES), max_tokens=10, temperature=0, n=2, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
        for index in (0, 1):
            text = "".join(
                choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index
            )
            assert text == text_of(self.PROMPT, 10)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2 * len(alone(list(self.PROMPT.encode()), 10))

    def test_parts_of_text_and_logprobs(self, letters: Running) -> None:
        made = letters.client.chat.completions.create(
            model="pretend", max_tokens=2, temperature=0, logprobs=True, top_logprobs=3,
            messages=[{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
        )  # fmt: skip
        assert made.choices[0].logprobs is not None
        first = made.choices[0].logprobs.content[0]
        assert (first.token, first.bytes, len(first.top_logprobs)) == ("a", [97], 3)
        assert made.choices[0].message.content == "ab"

    def test_the_default_length_is_the_model_s(self, letters: Running) -> None:
        made = letters.client.chat.completions.create(
            model="pretend", messages=[{"role": "user", "content": "hi"}], temperature=0
        )
        assert made.choices[0].message.content == "abcdefghijklmnopqrstuvwxyz"
        assert made.choices[0].finish_reason == "stop"


class TestOtherRoutes:
    def test_models(self, server: Running) -> None:
        assert [model.id for model in server.client.models.list()] == ["pretend"]
        assert server.client.models.retrieve("pretend").owned_by == "ds-inference"
        with pytest.raises(openai.NotFoundError):
            server.client.models.retrieve("gpt-5")

    def test_health_and_metrics_need_no_key(self, server: Running) -> None:
        server.client.completions.create(model="pretend", prompt="x", max_tokens=3, temperature=0)
        assert server.get("/health")[:2] == (200, {"status": "ok"})
        status, text, headers = server.get("/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        assert "ds_serve_output_tokens_total" in text
        assert 'ds_serve_http_responses_total{path="/v1/completions",status="200"}' in text
        assert "ds_serve_time_to_first_token_seconds_count" in text

    def test_request_ids(self, server: Running) -> None:
        headers = server.get("/health", **{"X-Request-Id": "my-id_1"})[2]
        assert headers["x-request-id"] == "my-id_1"
        assert server.get("/health", **{"X-Request-Id": "a b;" + "c" * 200})[2]["x-request-id"] != "my-id_1"

    def test_access_log(self, server: Running, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "ds_inference.serve.access"):
            server.client.completions.create(model="pretend", prompt="private words", max_tokens=1)
            deadline = time.monotonic() + 10
            while "/v1/completions" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "POST '/v1/completions' 200" in caplog.text
        assert "private" not in caplog.text


BODY = {"model": "pretend", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "pretend", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
LONG = "x" * 300


@pytest.mark.parametrize(
    ("path", "body", "status", "match", "param"),
    [
        ("completions", b"{", 400, "not JSON", None),
        ("completions", b"\xff\xfe", 400, "not JSON", None),
        ("completions", b"[" * 100_000, 400, "not JSON", None),
        ("completions", b"[1]", 400, "body", None),
        ("completions", {**BODY, "prompt": "a\ud800"}, 400, "surrogate", None),
        ("completions", {**BODY, "stop": "\udc00"}, 400, "surrogate", None),
        ("completions", {"prompt": "a"}, 400, "model: Field required", "model"),
        ("completions", {"model": "pretend"}, 400, "prompt: Field required", "prompt"),
        ("completions", {**BODY, "model": "gpt-5"}, 404, "'gpt-5' does not exist.*'pretend'", "model"),
        ("completions", {**BODY, "temprature": 1}, 400, "temprature is not a field", "temprature"),
        ("completions", {**BODY, "temperature": -1}, 400, "temperature", "temperature"),
        ("completions", {**BODY, "temperature": "hot"}, 400, "temperature", "temperature"),
        ("completions", {**BODY, "top_p": 0}, 400, "top_p", "top_p"),
        ("completions", {**BODY, "n": 0}, 400, "n:", "n"),
        ("completions", {**BODY, "max_tokens": 0}, 400, "max_tokens is 0", None),
        ("completions", {**BODY, "max_tokens": "5"}, 400, "max_tokens", "max_tokens"),
        ("completions", {**BODY, "max_tokens": True}, 400, "max_tokens", "max_tokens"),
        ("completions", {**BODY, "max_tokens": 5.0}, 400, "max_tokens", "max_tokens"),
        ("completions", {**BODY, "temperature": "0"}, 400, "temperature", "temperature"),
        ("completions", {**BODY, "stream": 1}, 400, "stream", "stream"),
        ("completions", {**BODY, "seed": True}, 400, "seed", "seed"),
        ("completions", {**BODY, "prompt": [1, True]}, 400, "prompt", None),
        ("chat/completions", {**CHAT, "max_completion_tokens": "5"}, 400, "max_completion_tokens", None),
        ("chat/completions", {**CHAT, "logprobs": "true"}, 400, "logprobs", "logprobs"),
        ("completions", {**BODY, "max_tokens": 1000}, 400, "ask for at most 253", None),
        ("completions", {**BODY, "prompt": LONG}, 400, "at most 255", None),
        ("completions", {**BODY, "prompt": ""}, 400, "empty prompt", None),
        ("completions", {**BODY, "prompt": []}, 400, "0 prompts", "prompt"),
        ("completions", {**BODY, "prompt": ["a"] * 200}, 400, "200 prompts", "prompt"),
        ("completions", {**BODY, "prompt": [5000]}, 400, "vocabulary", None),
        ("completions", {**BODY, "prompt": [-1]}, 400, "prompt", None),
        ("completions", {**BODY, "prompt": {"a": 1}}, 400, "prompt", "prompt"),
        ("completions", {**BODY, "prompt": [2**40], "echo": True}, 400, "vocabulary", None),
        ("completions", {**BODY, "repetition_penalty": 1e300}, 400, "repetition_penalty is", None),
        ("completions", {**BODY, "stop": [""]}, 400, "stop", None),
        ("completions", {**BODY, "stop": ["a"] * 50}, 400, "at most 16", None),
        ("completions", {**BODY, "logprobs": 100}, 400, "logprobs", "logprobs"),
        ("completions", {**BODY, "top_k": -5}, 400, "top_k is -5", None),
        ("completions", {**BODY, "logit_bias": {"a": 5}}, 400, "logit_bias", None),
        ("completions", {**BODY, "logit_bias": {"1": 500}}, 400, "logit_bias", None),
        ("completions", {**BODY, "presence_penalty": 5}, 400, "presence_penalty", "presence_penalty"),
        ("completions", {**BODY, "suffix": "end"}, 400, "suffix is not supported", "suffix"),
        ("completions", {**BODY, "best_of": 3}, 400, "best_of is not supported", "best_of"),
        ("completions", {**BODY, "stream_options": {"include_usage": True}}, 400, "stream_options needs", None),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate", None),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template is", None),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "content", "messages.0.content"),
        ("chat/completions", {**CHAT, "messages": [{"role": "nobody", "content": ""}]}, 400, "no role", None),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", None),
        ("chat/completions", {**CHAT, "top_logprobs": 3}, 400, "top_logprobs needs logprobs", None),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages", None),
        ("nothing", {}, 404, "Not Found", None),
        ("models", {}, 405, "Method Not Allowed", None),
    ],
)  # fmt: skip
def test_refusals(server: Running, path: str, body: Any, status: int, match: str, param: str | None) -> None:
    import re

    found, answer, _ = server.post(f"/v1/{path}", body)
    assert found == status
    assert set(answer) == {"error"}
    assert re.search(match, answer["error"]["message"])
    assert answer["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert answer["error"]["param"] == param
    server.wait_idle()


def test_options_that_mean_not_used_pass(server: Running) -> None:
    unused = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "n": 1, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "stop": None, "seed": -1, "metadata": {"a": "b"},
    }  # fmt: skip
    assert server.post("/v1/chat/completions", {**CHAT, **unused})[0] == 200


def test_many_requests_leave_nothing_behind() -> None:
    """Objects and memory after many requests are those after some: whole, streamed, refused, dropped by the client."""
    bodies = [
        {**BODY, "max_tokens": 2},
        {**BODY, "max_tokens": 2, "stream": True},
        {**BODY, "max_tokens": 3, "logprobs": 2, "stop": ["q"], "n": 2},
        {**BODY, "max_tokens": "no"},
    ]

    def many(count: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=30)
        for number in range(count):
            body = json.dumps({**bodies[number % 4], "prompt": f"question {number}"})
            connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            assert response.status == (400 if number % 4 == 3 else 200)
            if number % 50 == 1:  # a stream that nobody reads to its end
                response.close()
                connection.close()
            else:
                response.read()
        connection.close()

    def settled() -> tuple[int, int]:
        made.wait_idle()
        gc.collect()
        resident = (
            int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0
        )
        return len(gc.get_objects()), resident

    with running(make_core(scrambled)) as made:
        many(150)
        objects, resident = settled()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(many, [150] * 4))
        more_objects, more_resident = settled()
    assert more_objects - objects < 450, "an object per request would be 600"
    assert more_resident - resident < 16 << 20


def test_keys(server: Running) -> None:
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(BODY).encode(), given)
        status, answer, headers = server._send(request)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="no").models.list()


def test_bodies_that_are_too_large_or_do_not_come() -> None:
    with running(make_core(), body_nbytes=1000, body_seconds=0.2) as server:
        assert server.post("/v1/completions", {**BODY, "prompt": "x" * 2000})[0] == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 20) as slow:
            slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(100)
        with socket.create_connection(("127.0.0.1", server.port), 20) as chunked:
            chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
            chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
            assert b" 413 " in chunked.recv(100)


def test_a_batch_of_prompts_is_taken_whole_or_not_at_all() -> None:
    core = make_core(max_queued=20)
    with running(core) as server:
        steps = core.stats.steps
        status, answer, _ = server.post("/v1/completions", {**BODY, "prompt": ["a"] * 16, "max_tokens": 1})
        assert (status, len(answer["choices"])) == (200, 16)
        assert core.stats.steps - steps <= 4
        assert server.post("/v1/completions", {**BODY, "prompt": ["a"] * 30})[0] == 429
        assert server.post("/v1/completions", {**BODY, "prompt": ["a", LONG]})[0] == 400


def test_a_full_queue_is_429() -> None:
    core = make_core(max_running=1, max_queued=1)
    with running(core) as server:
        server.decoder.gate.clear()
        threads = [threading.Thread(target=server.post, args=("/v1/completions", BODY)) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        status, answer, headers = server.post("/v1/completions", BODY)
        server.decoder.gate.set()
        assert (status, answer["error"]["type"], headers["retry-after"]) == (429, "rate_limit_error", "1")
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_blocks(stream: bool) -> None:
    core = make_core()
    with running(core) as server:
        server.decoder.seconds = 0.005
        body = {**BODY, "max_tokens": 250, "ignore_eos": True, "stream": stream}
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port), 20) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
                + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            )  # fmt: skip
            while core.stats.output_tokens < 3:
                time.sleep(0.005)
            if stream:
                assert client.recv(4096)
        server.wait_idle()
        assert core.stats.output_tokens < 240


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_for_a_request_ends(stream: bool) -> None:
    core = make_core()
    with running(core, request_seconds=0.3) as server:
        server.decoder.seconds = 0.01
        body = {**BODY, "max_tokens": 250, "ignore_eos": True, "stream": stream}
        status, answer, _ = server.post("/v1/completions", body)
        if stream:
            assert status == 200
            assert '"type":"timeout_error"' in answer
            assert answer.endswith("data: [DONE]\n\n")
        else:
            assert (status, answer["error"]["type"]) == (504, "timeout_error")


def test_failures_are_errors_of_their_own_request() -> None:
    core = make_core()
    with running(core) as server:
        server.decoder.broken = lambda text: bytes(text[:3]) == b"bad"
        assert server.post("/v1/completions", {**BODY, "prompt": "bad"})[0] == 500
        assert "server_error" in server.post("/v1/completions", {**BODY, "prompt": "bad", "stream": True})[1]
        assert server.post("/v1/completions", BODY)[0] == 200
        # one of a batch fails: nothing of the others is left
        assert server.post("/v1/completions", {**BODY, "prompt": ["bad", "good"]})[0] == 500


def test_a_dead_engine_is_unhealthy() -> None:
    core = make_core(max_running=1)
    with running(core) as server:
        server.decoder.failing = OSError("the device is gone")
        for _ in range(3):
            assert server.post("/v1/completions", BODY)[0] == 500
        while server.engine.state != "dead":
            time.sleep(0.005)
        assert server.get("/health")[:2] == (503, {"status": "dead"})
        assert server.post("/v1/completions", BODY)[0] == 503
        assert "ds_serve_healthy 0.0" in server.get("/metrics")[1]


def test_shutdown_finishes_what_runs_and_refuses_the_rest() -> None:
    import signal

    core = make_core()
    with running(core) as server:
        server.decoder.seconds = 0.005
        answers: list[Any] = []
        body = {**BODY, "max_tokens": 100, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        thread.start()
        while core.stats.output_tokens < 3:
            time.sleep(0.005)
        server.server.handle_exit(signal.SIGTERM, None)
        while server.engine.state != "draining":
            time.sleep(0.005)
        status, answer, headers = server.post("/v1/completions", BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "shutting down" in answer["error"]["message"]
        assert server.get("/health")[0] == 503
        thread.join(30)
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert answers[0][0] == 200
        assert answers[0][1]["usage"]["completion_tokens"] == 100


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_args(["model"])
    assert (args.host, args.port, args.max_running) == ("127.0.0.1", 8000, 64)
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--api-key", "--quantization", "--max-body-bytes", "--no-prefix-caching"))


def test_a_model_that_cannot_be_served_is_said_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ds-serve: .*max_tokens_per_step is 2"):
        main([str(tmp_path), "--max-tokens-per-step", "2"])
    with pytest.raises(SystemExit, match=r"ds-serve: .*(is not there|needs transformers)"):
        main([str(tmp_path / "missing")])
