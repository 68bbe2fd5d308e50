"""The serving engine without threads: jobs go in, steps are made, deltas come out.

It owns the scheduler, the runner and the jobs. A job's first choice is computed like any request; the others are forked
from it when its prompt has been read, so that a prompt is read once. Whoever drives it calls `step` as long as
`has_work`, always from one thread.

Invariants: every choice of a job ends with exactly one last delta, or the job was aborted and gets none; a row that
cannot be sampled fails its own choice; a step that fails fails the choices that were in it, and nothing else; a job
that has ended leaves nothing behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ds_inference.errors import CapacityError, LogitsError, RequestError
from ds_inference.serve.blocks import BlockManager
from ds_inference.serve.outputs import Delta, Timing
from ds_inference.serve.request import FinishReason, Request, SamplingParams
from ds_inference.serve.runner import BlockCache, CausalDecoder, Runner
from ds_inference.serve.sampler import Sampled
from ds_inference.serve.scheduler import Scheduler, SchedulerLimits, StepPlan
from ds_inference.serve.text import StopText, TextCodec, TextStream

__all__ = ["MAX_CHOICES", "ServingCore", "ServingStats"]

MAX_CHOICES = 128
MAX_FAILURES = 3


@dataclass
class ServingStats:
    """Counts since the start; what happens now can be asked of the core."""

    steps: int = 0
    failed_steps: int = 0
    step_seconds: float = 0.0
    jobs: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    """Tokens that went through the model, those computed again after a preemption included."""


@dataclass(eq=False)
class _Job:
    job_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stream: bool
    salt: bytes
    timing: Timing
    unborn: deque[int]
    """Choices that are not with the scheduler yet."""
    live: dict[int, _Choice] = field(default_factory=dict)
    prompt_logprobs: list[Sampled] = field(default_factory=list)
    """As far as the prompt has been read."""


class _Choice:
    """One choice of a job: its request, and its text as far as it goes."""

    def __init__(self, job: _Job, index: int, request: Request, codec: TextCodec | None) -> None:
        self.job = job
        self.index = index
        self.request = request
        self.logprobs: list[Sampled] = []
        self.prompt_told = False
        self.text = ""
        self.at_once = codec is not None and (job.stream or bool(job.params.stop))
        """The text is made with every token, not only at the end."""
        self._grown = None if codec is None else TextStream(codec.decode, job.prompt)
        self._stops = StopText(job.params.stop)

    @property
    def stopped(self) -> str | None:
        return self._stops.stopped

    def say(self, tokens: Sequence[int], last: bool) -> None:
        """Make text of tokens; stop strings count from the first text after `min_tokens`."""
        if self._grown is None:
            return
        new = self._grown.push(tokens) if tokens else ""
        if last:
            new += self._grown.finish()
        if self.request.num_output <= self.job.params.min_tokens:
            self.text += new
            return
        self.text += self._stops.push(new)
        if last and self.stopped is None:
            self.text += self._stops.finish()

    def take_text(self) -> str:
        text, self.text = self.text, ""
        return text


class ServingCore:
    """A decoder, its cache and the jobs it serves.

    `cache` has the blocks that `blocks` manages. Without a `codec` there is no text: answers are tokens, and stop
    strings are refused.
    """

    def __init__(
        self,
        decoder: CausalDecoder,
        cache: BlockCache,
        blocks: BlockManager,
        limits: SchedulerLimits,
        codec: TextCodec | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.codec = codec
        self.eos_token_ids = eos_token_ids
        self.scheduler = Scheduler(blocks, limits)
        self.stats = ServingStats()
        self._runner = Runner(decoder, cache)
        self._jobs: dict[str, _Job] = {}
        self._choices: dict[str, _Choice] = {}
        self._expecting: dict[str, _Job] = {}
        self._failures = 0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def check(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> None:
        """RequestError if such a job could never be served. Needs no turn: any thread may ask."""
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
            raise RequestError(f"n is {n!r}; expected an int from 1 to {MAX_CHOICES}")
        if n > self.scheduler.limits.max_queued:
            raise RequestError(f"n is {n}; expected at most {self.scheduler.limits.max_queued} (max_queued)")
        if params.stop and self.codec is None:
            raise RequestError("stop strings need a tokenizer, and there is none; give stop_token_ids instead")
        if prompt and max(prompt) >= self.decoder.vocab_size:
            raise RequestError(
                f"the prompt has token {max(prompt)}; expected tokens below {self.decoder.vocab_size}, the vocabulary"
            )
        self.scheduler.check_size(len(prompt), params.max_tokens)

    def add(
        self,
        job_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        stream: bool = False,
        salt: bytes = b"",
    ) -> Timing:
        """Take a job. `stream`: a delta for every token, else one for each choice, at its end.

        RequestError when it can never be served, CapacityError when the queue is full. Returns its times, which are
        filled in as they come.
        """
        self.check(prompt, params, n)
        if job_id in self._jobs:
            raise RequestError(f"job {job_id!r} is there already; expected an id that is not in use")
        if self.scheduler.num_waiting + n > self.scheduler.limits.max_queued:
            raise CapacityError(
                f"{self.scheduler.num_waiting} requests are waiting and {n} would be added; the limit is "
                f"{self.scheduler.limits.max_queued} (max_queued): try again later"
            )
        job = _Job(job_id, tuple(prompt), params, stream, salt, Timing(time.monotonic()), deque(range(1, n)))
        if params.prompt_logprobs is not None:
            job.prompt_logprobs.append(Sampled(job.prompt[0]))
        choice = self._choice(job, 0)
        self.scheduler.add(choice.request)
        self._born(choice)
        self._jobs[job_id] = job
        self.stats.jobs += 1
        self.stats.prompt_tokens += len(job.prompt)
        return job.timing

    def has(self, job_id: str) -> bool:
        """Whether a job has not ended."""
        return job_id in self._jobs

    def abort_all(self) -> None:
        """Forget every job."""
        for job_id in list(self._jobs):
            self.abort(job_id)

    def abort(self, job_id: str) -> None:
        """Forget a job; its blocks are free at once. Unknown ones pass."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            job.unborn.clear()
            self._expecting.pop(job_id, None)
            for choice in list(job.live.values()):
                self._end(choice)

    def step(self) -> list[Delta]:
        """One pass of the model, and what came of it.

        A failed step is not an exception but deltas with an error, unless several in a row have failed: then
        RuntimeError, and all jobs are gone.
        """
        started = time.monotonic()
        self._bear()
        plan = self.scheduler.plan()
        try:
            results = self._runner.run(plan)
        except Exception as error:
            return self._failed(plan, error)
        self._failures = 0
        for work, found in self._runner.scored:
            known = self._choices[work.request.request_id].job.prompt_logprobs
            known[work.start + 1 : work.start + 1 + len(found)] = found
        deltas = [
            self._fail(work.request.request_id, result)
            for work, result in zip(plan.sampling, results, strict=True)
            if isinstance(result, LogitsError)
        ]
        sampled = {work.request.request_id: result for work, result in zip(plan.sampling, results, strict=True)}
        tokens = [result.token if isinstance(result, Sampled) else 0 for result in results]
        now = time.monotonic()
        for progress in self.scheduler.update(plan, tokens):
            result = sampled[progress.request.request_id]
            if isinstance(result, Sampled):
                choice = self._choices[progress.request.request_id]
                if choice.job.timing.first_token is None:
                    choice.job.timing.first_token = now
                    if choice.job.unborn:
                        self._expecting[choice.job.job_id] = choice.job
                deltas += self._advance(choice, result, progress.finish_reason)
                self.stats.output_tokens += 1
        self.stats.steps += 1
        self.stats.computed_tokens += plan.num_tokens
        self.stats.step_seconds += time.monotonic() - started
        return deltas

    def _advance(self, choice: _Choice, result: Sampled, reason: FinishReason | None) -> list[Delta]:
        """A choice has a new token: its text, whether that ends it, and the delta if one is due."""
        request, stream = choice.request, choice.job.stream
        ended = reason == "stop"
        stop: str | int | None = result.token if ended else None
        if choice.job.params.logprobs is not None:
            choice.logprobs.append(result)
        if choice.at_once:
            choice.say([] if ended else [result.token], reason is not None)
        elif reason is not None:
            choice.say(request.output[:-1] if ended else request.output, True)
        if choice.stopped is not None:
            reason, stop = "stop", choice.stopped
        if not stream and reason is None:
            return []
        logprobs, choice.logprobs = tuple(choice.logprobs), []
        prompt_logprobs = () if choice.prompt_told else tuple(choice.job.prompt_logprobs)
        choice.prompt_told = True
        delta = Delta(
            choice.job.job_id,
            choice.index,
            choice.take_text(),
            (result.token,) if stream else tuple(request.output),
            logprobs,
            reason,
            stop,
            num_cached=request.num_cached,
            prompt_logprobs=prompt_logprobs,
        )
        if reason is not None:
            self._end(choice)
        return [delta]

    def _choice(self, job: _Job, index: int) -> _Choice:
        seed = job.params.seed
        params = job.params if index == 0 or seed is None else replace(job.params, seed=(seed + index) % 2**64)
        name = job.job_id if index == 0 else f"{job.job_id}#{index}"
        request = Request(name, job.prompt, params, self.eos_token_ids, job.salt)
        return _Choice(job, index, request, self.codec)

    def _born(self, choice: _Choice) -> None:
        choice.job.live[choice.index] = choice
        self._choices[choice.request.request_id] = choice

    def _bear(self) -> None:
        """Give the scheduler the other choices of jobs whose prompt has been read."""
        for job in list(self._expecting.values()):
            while job.unborn:
                choice = self._choice(job, job.unborn[0])
                try:
                    if job.job_id in self._choices:
                        self.scheduler.fork(job.job_id, choice.request)
                    else:  # the first choice has ended already
                        self.scheduler.add(choice.request)
                except CapacityError:
                    return  # those that wait move on, and then there is room
                job.unborn.popleft()
                self._born(choice)
            del self._expecting[job.job_id]

    def _end(self, choice: _Choice) -> None:
        """A choice is over, and its job if it was the last."""
        self.scheduler.finish(choice.request.request_id)
        del self._choices[choice.request.request_id]
        job = choice.job
        del job.live[choice.index]
        if not job.live and not job.unborn:
            job.timing.finished = time.monotonic()
            self._jobs.pop(job.job_id, None)

    def _fail(self, request_id: str, error: Exception) -> Delta:
        choice = self._choices[request_id]
        if choice.job.unborn:
            self._expecting[choice.job.job_id] = choice.job
        self._end(choice)
        return Delta(choice.job.job_id, choice.index, "", (), error=error)

    def _failed(self, plan: StepPlan, error: Exception) -> list[Delta]:
        """The step could not be made: who was in it fails, who was not is computed again from what is known."""
        self.stats.failed_steps += 1
        self._failures += 1
        self.scheduler.restart()
        deltas = [self._fail(work.request.request_id, error) for work in plan.work]
        if self._failures >= MAX_FAILURES:
            self.abort_all()
            raise RuntimeError(f"{self._failures} steps in a row failed, the last with: {error!r}") from error
        return deltas
