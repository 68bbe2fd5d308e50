"""Serving for many callers at once: one thread computes, any number of asyncio tasks wait for their own tokens.

The **worker** thread owns the core; others reach it through an inbox that it empties between steps. Deltas go to the
callers' loop once per step, all together. A caller that gives up (its task is cancelled, its stream closed) has its job
aborted before the next step.

States: *running*; *draining*: what was taken is finished, new jobs are refused; *closed*; *dead*: the worker has
failed, every stream raised the reason and every new job does.

Invariants: a job's stream ends with the last delta of each choice, or raises; nothing waits forever on a worker that is
gone; a job that nobody waits for is not computed.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch

from ds_comm.log import get_logger
from ds_inference.errors import CapacityError, ConfigError, RequestError
from ds_inference.serve.core import ServingCore
from ds_inference.serve.options import Model, ServingOptions, build_core
from ds_inference.serve.outputs import Delta, Timing
from ds_inference.serve.request import SamplingParams

__all__ = ["AsyncLLM", "JobStream"]

_log = get_logger(__name__)


class JobStream:
    """The deltas of one job, as they come. Iterate over it once, by `async for`; `close` it when you stop before."""

    def __init__(self, engine: AsyncLLM, job_id: str, n: int, prompt: Sequence[int]) -> None:
        self.job_id = job_id
        self.prompt = prompt
        self.timing: Timing = Timing(time.monotonic())
        self.loop = asyncio.get_running_loop()
        self._engine = engine
        self._left = n
        self._deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self.admitted: asyncio.Future[None] = self.loop.create_future()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._left == 0:
            raise StopAsyncIteration
        try:
            item = await self._deltas.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(item, BaseException):
            self._left = 0
            raise item
        self._left -= item.last
        return item

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort the job if it has not ended. May be called again."""
        if self._left:
            self._left = 0
            self._engine.abort(self.job_id)

    def put(self, item: Delta | BaseException) -> None:
        """The worker's side, on the stream's loop."""
        self._deltas.put_nowait(item)


class AsyncLLM:
    """A serving engine for asyncio programs.

    ConfigError for a decoder of a tensor-parallel group. `stall_seconds`: a step that takes longer makes `healthy`
    false. Start it (`async with`, or `start`) before use.
    """

    def __init__(self, core: ServingCore, *, stall_seconds: float = 300.0) -> None:
        if getattr(core.decoder, "communicator", None) is not None:
            raise ConfigError(
                "this decoder is split over ranks, whose steps would part; expected a core that leads them "
                "(ds_inference.serve.ranks.leading), or use LLM, called alike on every rank"
            )
        self.core = core
        self.stall_seconds = stall_seconds
        self.failure: BaseException | None = None
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._streams: dict[str, JobStream] = {}
        self._entering: set[str] = set()
        self._ids = itertools.count()
        self._draining = False
        self._closing = False
        self._ended = False
        self._step_started: float | None = None
        self._worker: threading.Thread | None = None
        self._num_threads = torch.get_num_threads()

    @classmethod
    def build(cls, model: Model, *, tokenizer: Any = None, stall_seconds: float = 300.0, **options: Any) -> AsyncLLM:
        """The same from a model; the keywords are those of `LLM`."""
        return cls(build_core(model, ServingOptions.of(options), tokenizer), stall_seconds=stall_seconds)

    @property
    def state(self) -> str:
        """running, stalled (a step takes too long), draining, closed or dead."""
        if self.failure is not None:
            return "dead"
        if self._worker is None or not self._worker.is_alive():
            return "closed"
        if self._draining:
            return "draining"
        started = self._step_started
        return "stalled" if started is not None and time.monotonic() - started > self.stall_seconds else "running"

    @property
    def healthy(self) -> bool:
        return self.state == "running"

    @property
    def num_jobs(self) -> int:
        """Jobs that somebody waits for."""
        return len(self._streams)

    def start(self) -> None:
        """Start the worker."""
        if self._worker is not None:
            raise RuntimeError("this engine was started already; build another one")
        self._worker = threading.Thread(target=self._work, name="ds-serve-worker", daemon=True)
        self._worker.start()

    async def __aenter__(self) -> AsyncLLM:
        self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        stream: bool = True,
        salt: bytes = b"",
        job_id: str | None = None,
    ) -> JobStream:
        """Take a job and return its stream once it is in the queue.

        RequestError when it can never be served, CapacityError when the queue is full or the engine shuts down,
        RuntimeError when the engine is dead.
        """
        self._check_open()
        self.core.check(prompt, params, n)
        waiting, limit = self.core.scheduler.num_waiting + len(self._entering), self.core.scheduler.limits.max_queued
        if waiting + n > limit:
            raise CapacityError(f"{waiting} requests are waiting, the limit is {limit} (max_queued); try again later")
        if job_id in self._streams:
            raise RequestError(f"job {job_id!r} is there already; expected an id that is not in use, or None")
        job = JobStream(self, job_id or f"job-{next(self._ids)}", n, prompt)

        def add() -> None:
            self._entering.discard(job.job_id)
            try:
                timing = self.core.add(job.job_id, prompt, params, n=n, stream=stream, salt=salt)
            except Exception as error:
                self._streams.pop(job.job_id, None)
                self._call(job.loop, _settle, job.admitted, error)
            else:
                timing.arrived = job.timing.arrived
                job.timing = timing
                self._call(job.loop, _settle, job.admitted, None)

        self._streams[job.job_id] = job
        self._entering.add(job.job_id)
        if not self._tell(add):
            del self._streams[job.job_id]
            self._entering.discard(job.job_id)
            self._check_open()
        try:
            await job.admitted
        except asyncio.CancelledError:
            job.close()
            raise
        return job

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, n: int = 1
    ) -> AsyncIterator[Delta]:
        """The deltas of a prompt's answers; ending the iteration early aborts them. Errors as in `submit`."""
        if isinstance(prompt, str):
            if self.core.codec is None:
                raise RuntimeError("a prompt as text needs a tokenizer, and there is none; give token numbers")
            prompt = await asyncio.to_thread(self.core.codec.encode, prompt)
        async with await self.submit(prompt, params or SamplingParams(), n=n) as job:
            async for delta in job:
                yield delta

    def abort(self, job_id: str) -> None:
        """Give up a job, from any thread; its stream gets nothing more. Unknown ones pass."""
        if self._streams.pop(job_id, None) is not None:
            self._tell(lambda: self.core.abort(job_id))

    def abort_all(self) -> None:
        """Give up every job; their streams raise CapacityError."""
        error = CapacityError("the engine was shut down before the answer was complete; send the request again")
        for job in list(self._streams.values()):
            self._call(job.loop, job.put, error)
            self.abort(job.job_id)

    async def drain(self, seconds: float) -> bool:
        """Refuse new jobs and wait for the others at most so long; whether all of them ended."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._streams and self.failure is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._streams

    async def close(self, seconds: float = 0.0) -> None:
        """Drain for so long, then end the worker; jobs that are left raise CapacityError in their streams."""
        await self.drain(seconds)
        self.abort_all()
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._worker is not None:
            await asyncio.to_thread(self._worker.join)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the engine is dead and has to be started anew: {self.failure}") from self.failure
        if self._draining or self._closing:
            raise CapacityError("the engine is shutting down and takes no new requests")
        if self._worker is None:
            raise RuntimeError("the engine was not started; use `async with engine`, or call start")

    def _tell(self, command: Callable[[], None]) -> bool:
        """Have the worker do something before its next step; False when it has ended."""
        with self._wake:
            if self._ended:
                return False
            self._inbox.append(command)
            self._wake.notify()
        return True

    def _work(self) -> None:
        # A thread has thread counts of its own, which start from the machine's.
        torch.set_num_threads(self._num_threads)
        error: BaseException = CapacityError("the engine was shut down before the answer was complete; send it again")
        try:
            while self._next_step():
                pass
        except BaseException as failure:
            _log.exception("the serving engine has died")
            self.failure = error = failure
        with self._wake:
            self._ended = True
        for job in list(self._streams.values()):
            self._call(job.loop, _settle, job.admitted, error)
            self._call(job.loop, job.put, error)
        self._streams.clear()

    def _next_step(self) -> bool:
        """Do what was asked, make a step if there is one to make; False at the end."""
        with self._wake:
            while not (self._inbox or self.core.has_work or self._closing):
                self._wake.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        if self.core.has_work:
            self._step_started = time.monotonic()
            self._deliver(self.core.step())
            self._step_started = None
        return bool(self.core.has_work or self._inbox or not self._closing)

    def _deliver(self, deltas: list[Delta]) -> None:
        """Hand deltas to the loops of those who wait, one call for each loop."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[JobStream, Delta]]] = {}
        for delta in deltas:
            job = self._streams.get(delta.job_id)
            if job is not None:
                loops.setdefault(job.loop, []).append((job, delta))
        for delta in deltas:  # only now: several choices of a job may have ended in this step
            if delta.last and not self.core.has(delta.job_id):
                self._streams.pop(delta.job_id, None)
        for loop, parts in loops.items():
            if not self._call(loop, self._hand_out, parts):
                for job, _ in parts:
                    self.abort(job.job_id)

    def _hand_out(self, parts: list[tuple[JobStream, Delta]]) -> None:
        for job, delta in parts:
            job.put(delta)

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> bool:
        """Call on a loop; False when the loop is closed."""
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
