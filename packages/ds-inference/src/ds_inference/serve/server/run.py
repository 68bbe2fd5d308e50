"""The server's process: `ds-serve MODEL`.

On SIGTERM or SIGINT it refuses new requests with 503, finishes those that run within a time limit, and ends; a second
signal ends it at once. It listens on localhost unless told otherwise.

Started on several ranks (`torchrun --nproc-per-node 2 -m ds_inference.serve MODEL`), each holds its part of the model;
the first one listens, and the others follow it until it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

import ds_comm
from ds_comm.log import configure, current_rank, get_logger
from ds_inference.__about__ import __version__
from ds_inference.errors import CheckpointError, ConfigError, LogitsError, ModelError, RequestError
from ds_inference.serve.async_engine import AsyncLLM
from ds_inference.serve.core import ServingCore
from ds_inference.serve.options import ServingOptions, build_core, read_model
from ds_inference.serve.ranks import follow, leading
from ds_inference.serve.request import SamplingParams
from ds_inference.serve.server.app import ServerLimits, build_app
from ds_inference.tp.apply import apply_tensor_parallel

__all__ = ["DrainingServer", "main", "parse_args", "serve"]

_log = get_logger("ds_inference.serve")
API_KEY_VARIABLE = "DS_SERVE_API_KEY"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that goes on listening, to refuse, while its engine finishes what it has."""

    def __init__(self, config: uvicorn.Config, engine: AsyncLLM, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._engine:
            await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._finish(sig))

    async def _finish(self, sig: int) -> None:
        _log.info("%s: finishing %d requests, new ones are refused", signal.Signals(sig).name, self._engine.num_jobs)
        if not await self._engine.drain(self._drain_seconds):
            _log.warning("%d requests were not finished within %g s", self._engine.num_jobs, self._drain_seconds)
            self._engine.abort_all()
        self.should_exit = True


def serve(
    engine: AsyncLLM,
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    limits: ServerLimits | None = None,
    drain_seconds: float = 30.0,
) -> None:
    """Serve an engine that has not been started, until a signal comes. Blocks."""
    app = build_app(engine, model=model, api_keys=api_keys, limits=limits)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        lifespan="off",
    )
    DrainingServer(config, engine, drain_seconds).run()


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ds-serve",
        description="Serve a causal language model with OpenAI's HTTP interface: /v1/completions, "
        "/v1/chat/completions, /v1/models, /health, /metrics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a transformers folder, or a GGUF file")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    http = parser.add_argument_group("HTTP")
    add = http.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one: give a key then")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--served-model-name", help="the name that clients give; the path's last part if left out")
    add("--api-key", action="append", default=[], help=f"a key that clients must send; may be repeated. Also read from "
        f"{API_KEY_VARIABLE}, where other users of the machine do not see it")  # fmt: skip
    add("--max-body-bytes", type=int, default=ServerLimits.body_nbytes, help="larger bodies are refused (413)")
    add("--request-timeout", type=float, default=ServerLimits.request_seconds, help="seconds for a whole answer")
    add("--shutdown-timeout", type=float, default=30.0, help="seconds to finish running requests after SIGTERM")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="of the log on stderr")
    engine = parser.add_argument_group("engine")
    add = engine.add_argument
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; the checkpoint's if left out")
    add("--device", help="cpu, cuda, cuda:1, ...; the accelerator if there is one")
    add("--quantization", choices=["int8", "int4"], help="weight-only quantisation")
    add("--max-length", type=int, help="tokens of prompt and answer together, at least 4; the model's if left out")
    add("--max-running", type=int, default=64, help="requests computed side by side")
    add("--max-queued", type=int, default=1024, help="requests that may wait; more are refused (429)")
    add("--max-tokens-per-step", type=int, default=512, help="how much of long prompts is read at a time")
    add("--block-size", type=int, default=16, help="tokens per block of the cache")
    add("--cache-bytes", type=int, help="memory of the cache; by the limits, at most a quarter of what is free")
    add("--no-prefix-caching", action="store_true", help="compute equal beginnings of prompts every time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `ds-serve`."""
    args = parse_args(arguments)
    configure("ds_inference", getattr(logging, args.log_level.upper()))
    keys = [*args.api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)])]
    try:
        core = _core(args)
        if _num_ranks() > 1 and current_rank() > 0:
            _follow(core)
            return
        with contextlib.nullcontext(core) if _num_ranks() == 1 else leading(core) as core:
            _warm_up(core)
            _serve(args, AsyncLLM(core), keys)
    except (CheckpointError, ConfigError, LogitsError, ModelError, RequestError) as error:
        sys.exit(f"ds-serve: {error}")


def _serve(args: argparse.Namespace, engine: AsyncLLM, keys: Sequence[str]) -> None:
    name = args.served_model_name or os.path.basename(os.path.normpath(args.model)).removesuffix(".gguf")
    _log.info("serving %r on http://%s:%d/v1", name, args.host, args.port)
    limits = ServerLimits(body_nbytes=args.max_body_bytes, request_seconds=args.request_timeout)
    serve(engine, model=name, host=args.host, port=args.port, api_keys=keys, limits=limits,
          drain_seconds=args.shutdown_timeout)  # fmt: skip


def _warm_up(core: ServingCore) -> None:
    """Compute a few tokens, so that no client waits for kernels to be compiled; a model that cannot is known now."""
    core.add("warm-up", [0, 0], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    while core.has_work:
        for delta in core.step():
            if delta.error is not None:
                raise delta.error


def _follow(core: ServingCore) -> None:
    """Another rank: a signal to all of them is the first one's to obey, so that it can finish what it has."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow(core)


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _core(args: argparse.Namespace) -> ServingCore:
    options = _options(args)
    if _num_ranks() == 1:
        return build_core(args.model, options)
    ds_comm.init_distributed()
    model, tokenizer = read_model(Path(args.model), options)
    apply_tensor_parallel(model)
    return build_core(model, options, tokenizer)


def _options(args: argparse.Namespace) -> ServingOptions:
    return ServingOptions(
        dtype=args.dtype,
        device=args.device,
        quantization=args.quantization,
        max_length=args.max_length,
        max_running=args.max_running,
        max_queued=args.max_queued,
        max_tokens_per_step=args.max_tokens_per_step,
        block_size=args.block_size,
        cache_nbytes=args.cache_bytes,
        prefix_caching=not args.no_prefix_caching,
    )
