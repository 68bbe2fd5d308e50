"""Serving a trace of requests, inside a contender's process: what arrives when, and when its tokens come.

A request of the trace is `{"at": seconds, "prompt": [tokens], "new": n}`; it is not known before `at`. Everybody
decodes greedily and to the full length. Answers hold, per request, seconds from the start of the trace to its first and
to its last token.

- `ours`: `ds_inference.AsyncLLM`, a task per request, at most `slots` requests side by side.
- `transformers`: whenever it is idle it takes up to `slots` waiting requests, pads them on the left and generates until
  the longest answer is complete; each is done with its batch, and its first token is the batch's.
- `llama.cpp`: see `_llama.serve`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Job:
    """A request and its answer so far."""

    at: float
    prompt: list[int]
    new: int
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    read: int = 0
    """Tokens of the prompt that were computed."""

    def take(self, tokens: list[int], now: float) -> None:
        """More of the answer, at `now`."""
        self.first = self.first or now
        self.last = now
        self.tokens.extend(tokens)


class Clock:
    """Seconds since the start of the trace."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


def run(family: Any, requests: list[dict[str, Any]], slots: int) -> dict[str, Any]:
    """Serve the trace by `family` (of `_infer_worker`)."""
    jobs = [Job(**request) for request in requests]
    name = family.spec["kind"].partition(":")[0]
    if name == "llama.cpp":
        from _llama import serve

        serve(family.llama, jobs, slots)
    else:
        {"ours": ours, "transformers": transformers}[name](family, jobs, slots)
    for job in jobs:
        if len(job.tokens) != job.new:
            raise RuntimeError(f"a request for {job.new} tokens got {len(job.tokens)}")
    return {"first": [job.first for job in jobs], "last": [job.last for job in jobs]}


def ours(family: Any, jobs: list[Job], slots: int) -> None:
    """Continuous batching."""
    from ds_inference import AsyncLLM, SamplingParams

    async def serve() -> None:
        async with AsyncLLM(family.core) as engine:
            clock = Clock()

            async def one(job: Job) -> None:
                await asyncio.sleep(max(0.0, job.at - clock.now()))
                params = SamplingParams(max_tokens=job.new, temperature=0, ignore_eos=True)
                async for delta in engine.generate(job.prompt, params):
                    job.take(list(delta.tokens), clock.now())

            await asyncio.gather(*(one(job) for job in jobs))

    asyncio.run(serve())


def transformers(family: Any, jobs: list[Job], slots: int) -> None:
    """One padded batch after another."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stamp(StoppingCriteria):  # type: ignore[misc]
        """Notes when the first token is there; stops nothing."""

        first = 0.0

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.first = self.first or clock.now()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    waiting, clock = deque(jobs), Clock()
    while waiting:
        clock.sleep_until(waiting[0].at)
        batch: list[Job] = []
        while waiting and waiting[0].at <= clock.now() and len(batch) < slots:
            batch.append(waiting.popleft())
        longest = max(len(job.prompt) for job in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, job in enumerate(batch):
            tokens[row, longest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, longest - len(job.prompt) :] = 1
        stamp = Stamp()
        with torch.inference_mode():
            output = family.model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=max(job.new for job in batch),
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stamp]),
            )
        for job, row_tokens in zip(batch, output[:, longest:].tolist(), strict=True):
            job.take(row_tokens[: job.new], clock.now())
            job.first = stamp.first
