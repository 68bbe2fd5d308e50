"""Prometheus metrics of a server, in a registry of their own: several servers fit in a process.

Counts are read from the engine when somebody asks; only durations are observed as they happen.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ds_inference.serve.async_engine import AsyncLLM
from ds_inference.serve.outputs import Timing

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class ServerMetrics:
    """What `/metrics` shows."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCounts(engine))
        self.responses = Counter(
            "ds_serve_http_responses", "HTTP responses by path and status", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "ds_serve_time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._each = Histogram(
            "ds_serve_time_per_output_token_seconds", "Between tokens of an answer, its mean", buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "ds_serve_request_seconds", "From arrival to the end", buckets=_SECONDS, registry=self._registry
        )

    def finished(self, timing: Timing, num_tokens: int) -> None:
        """A job has ended with so many tokens of its longest choice."""
        if timing.first_token is None or timing.finished is None:
            return
        self._first.observe(timing.first_token - timing.arrived)
        self._whole.observe(timing.finished - timing.arrived)
        if num_tokens > 1:
            self._each.observe((timing.finished - timing.first_token) / (num_tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCounts(Collector):
    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        core = self._engine.core
        scheduler, blocks, stats = core.scheduler, core.scheduler.blocks, core.stats
        for name, text, count in (
            ("steps", "Passes of the model", stats.steps),
            ("failed_steps", "Passes that failed", stats.failed_steps),
            ("step_seconds", "Time in passes", stats.step_seconds),
            ("requests", "Prompts that were taken", stats.jobs),
            ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
            ("output_tokens", "Tokens generated", stats.output_tokens),
            ("computed_tokens", "Tokens through the model", stats.computed_tokens),
            ("cached_tokens", "Prompt tokens found in the cache", scheduler.num_cached_tokens),
            ("preemptions", "Requests computed again for want of room", scheduler.num_preemptions),
            ("evicted_blocks", "Cached blocks whose room was needed", blocks.num_evicted),
        ):
            yield CounterMetricFamily(f"ds_serve_{name}", text, value=count)
        for name, text, value in (
            ("running_requests", "Requests being computed", scheduler.num_running),
            ("waiting_requests", "Requests in the queue", scheduler.num_waiting),
            ("cache_blocks", "Blocks of the cache", blocks.num_blocks),
            ("cache_blocks_free", "Blocks that can be had, those with cached prefixes included", blocks.num_free),
            ("cache_blocks_cached", "Free blocks that hold a known prefix", blocks.num_cached),
            ("healthy", "1 while the engine takes and computes requests", int(self._engine.healthy)),
        ):
            yield GaugeMetricFamily(f"ds_serve_{name}", text, value=value)
