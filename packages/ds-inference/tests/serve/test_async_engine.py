"""Many callers, one worker: answers, giving up, failing, ending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from serve_fakes import END, FakeDecoder, alone, greedy, make_core

from ds_inference import AsyncLLM, Completion, JobStream, ServingCore
from ds_inference.errors import CapacityError, ConfigError, LogitsError, RequestError


def serving(core: ServingCore, use: Callable[[AsyncLLM], Awaitable[Any]], **options: Any) -> Any:
    """Run `use` on an engine, then end it; every block must be free again."""

    async def run() -> Any:
        async with AsyncLLM(core, **options) as engine:
            result = await use(engine)
            await idle(engine)
        assert engine.state in ("closed", "dead")
        return result

    result = asyncio.run(asyncio.wait_for(run(), 60))
    blocks = core.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    return result


async def idle(engine: AsyncLLM) -> None:
    while engine.core.has_work or engine.num_jobs:
        await asyncio.sleep(0.005)


async def answer(job: JobStream) -> Completion:
    whole = Completion(0)
    async for delta in job:
        if delta.error is not None:
            raise delta.error
        whole.take(delta)
    return whole


def decoder_of(core: ServingCore) -> FakeDecoder:
    assert isinstance(core.decoder, FakeDecoder)
    return core.decoder


@pytest.mark.parametrize("stream", [True, False])
def test_choices_that_end_in_the_same_step_are_all_delivered(stream: bool) -> None:
    async def use(engine: AsyncLLM) -> list[int]:
        job = await engine.submit(list(b"abc"), greedy(5, ignore_eos=True), n=4, stream=stream)
        return sorted([delta.index async for delta in job if delta.last])

    assert serving(make_core(), use) == [0, 1, 2, 3]


def test_many_callers_get_their_own() -> None:
    prompts = [list(f"prompt number {number}".encode()) for number in range(40)]

    async def ask(engine: AsyncLLM, number: int) -> list[int]:
        await asyncio.sleep(number % 7 / 500)
        job = await engine.submit(prompts[number], greedy(15), stream=number % 2 == 0)
        return (await answer(job)).token_ids

    async def use(engine: AsyncLLM) -> list[list[int]]:
        return await asyncio.gather(*(ask(engine, number) for number in range(40)))

    core = make_core(num_blocks=32)
    assert serving(core, use) == [alone(prompt, 15) for prompt in prompts]


def test_generate_takes_text_and_streams() -> None:
    async def use(engine: AsyncLLM) -> list[tuple[int, ...]]:
        assert engine.state == "running"
        return [delta.tokens async for delta in engine.generate("some text", greedy(6))]

    tokens = serving(make_core(), use)
    assert [one for (one,) in tokens] == alone(list(b"some text"), 6)


def test_a_caller_that_stops_listening_frees_the_blocks() -> None:
    async def use(engine: AsyncLLM) -> None:
        count = 0
        async for _ in engine.generate("never ends", greedy(200, ignore_eos=True)):
            count += 1
            if count == 3:
                break
        await idle(engine)
        assert engine.core.stats.output_tokens < 100

    core = make_core()
    decoder_of(core).seconds = 0.002
    serving(core, use)


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_a_cancelled_caller_frees_the_blocks(wait: float) -> None:
    async def use(engine: AsyncLLM) -> None:
        async def ask() -> None:
            await answer(await engine.submit(list(b"never ends"), greedy(200, ignore_eos=True)))

        task = asyncio.create_task(ask())
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)
        assert engine.core.stats.output_tokens < 150

    core = make_core()
    decoder_of(core).seconds = 0.002
    serving(core, use)


def test_refusals_reach_the_caller() -> None:
    async def use(engine: AsyncLLM) -> None:
        with pytest.raises(RequestError, match="vocabulary"):
            await engine.submit([10**6], greedy(1))
        with pytest.raises(RequestError, match="at most 255"):
            await engine.submit([1] * 300, greedy(1))
        decoder_of(engine.core).gate.clear()
        jobs = [asyncio.create_task(engine.submit(list(b"abc"), greedy(2), n=2)) for _ in range(6)]
        await asyncio.sleep(0.05)
        decoder_of(engine.core).gate.set()
        made = await asyncio.gather(*jobs, return_exceptions=True)
        assert any(isinstance(one, CapacityError) for one in made)
        for one in made:
            if isinstance(one, JobStream):
                await answer(one)

    serving(make_core(max_queued=4, max_running=1), use)


def test_an_id_names_one_job() -> None:
    async def use(engine: AsyncLLM) -> None:
        job = await engine.submit(list(b"abc"), greedy(5), job_id="mine")
        with pytest.raises(RequestError, match="'mine' is there already"):
            await engine.submit(list(b"abd"), greedy(5), job_id="mine")
        assert (await answer(job)).token_ids == alone(list(b"abc"), 5)

    core = make_core()
    decoder_of(core).seconds = 0.02
    serving(core, use)


def test_one_that_fails_leaves_the_others() -> None:
    async def use(engine: AsyncLLM) -> None:
        bad = await engine.submit(list(b"bad"), greedy(5))
        good = await engine.submit(list(b"good"), greedy(5))
        with pytest.raises(LogitsError):
            await answer(bad)
        assert (await answer(good)).token_ids == alone(list(b"good"), 5)
        assert engine.healthy

    core = make_core()
    decoder_of(core).broken = lambda text: bytes(text[:3]) == b"bad"
    serving(core, use)


def test_a_failed_step_and_then_it_goes_on() -> None:
    async def use(engine: AsyncLLM) -> None:
        decoder_of(core).failing = MemoryError("no room")
        with pytest.raises(MemoryError):
            await answer(await engine.submit(list(b"first"), greedy(5)))
        decoder_of(core).failing = None
        assert (await answer(await engine.submit(list(b"second"), greedy(5)))).token_ids == alone(list(b"second"), 5)

    core = make_core()
    serving(core, use)


def test_a_dead_engine_says_so_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    async def use(engine: AsyncLLM) -> None:
        decoder_of(core).gate.clear()
        tasks = [asyncio.create_task(engine.submit(list(b"abc"), greedy(5))) for _ in range(5)]
        await asyncio.sleep(0.02)
        decoder_of(core).failing = OSError("the device is gone")
        decoder_of(core).gate.set()
        jobs = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, JobStream)]
        results = await asyncio.gather(*(answer(job) for job in jobs), return_exceptions=True)
        assert all("the device is gone" in str(one) for one in results)
        while engine.state != "dead":
            await asyncio.sleep(0.005)
        assert not engine.healthy
        with pytest.raises(RuntimeError, match=r"dead.*the device is gone"):
            await engine.submit(list(b"abc"), greedy(5))

    core = make_core(max_running=1)
    serving(core, use)
    assert "has died" in caplog.text


def test_drain_finishes_what_was_taken_and_refuses_the_rest() -> None:
    async def use(engine: AsyncLLM) -> None:
        jobs = [await engine.submit(list(b"abc"), greedy(10, ignore_eos=True)) for _ in range(3)]
        draining = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0)
        assert engine.state == "draining"
        with pytest.raises(CapacityError, match="shutting down"):
            await engine.submit(list(b"abc"), greedy(5))
        assert [len((await answer(job)).token_ids) for job in jobs] == [10, 10, 10]
        assert await draining

    core = make_core(max_running=1)
    decoder_of(core).seconds = 0.001
    serving(core, use)


def test_close_ends_what_is_left() -> None:
    async def use(engine: AsyncLLM) -> None:
        job = await engine.submit(list(b"abc"), greedy(200, ignore_eos=True))
        assert not await engine.drain(0.01)
        await engine.close()
        with pytest.raises(CapacityError, match="shut down"):
            await answer(job)
        assert engine.state == "closed"

    core = make_core()
    decoder_of(core).seconds = 0.005
    serving(core, use)


def test_a_step_that_hangs_is_seen() -> None:
    async def use(engine: AsyncLLM) -> None:
        decoder_of(core).gate.clear()
        job = await engine.submit(list(b"abc"), greedy(2))
        while engine.state != "stalled":
            await asyncio.sleep(0.005)
        decoder_of(core).gate.set()
        await answer(job)
        while engine.state != "running":
            await asyncio.sleep(0.005)

    core = make_core()
    serving(core, use, stall_seconds=0.05)


def test_long_prompts_do_not_stop_those_that_decode() -> None:
    """While a prompt of many steps is read, another answer grows by a token in each step."""

    async def use(engine: AsyncLLM) -> None:
        job = await engine.submit(list(b"abc"), greedy(60, ignore_eos=True))
        deltas = job.__aiter__()
        await deltas.__anext__()
        before = core.stats.steps
        long = await engine.submit([ord("x")] * 200, greedy(1))
        count = 0
        async for _ in long:
            count = core.stats.output_tokens
        assert count - before >= (core.stats.steps - before) * 0.8
        await answer(job)

    core = make_core(max_tokens_per_step=9)
    decoder_of(core).seconds = 0.001
    serving(core, use)


def test_use_before_the_start_and_starting_twice() -> None:
    async def run() -> None:
        engine = AsyncLLM(make_core())
        with pytest.raises(RuntimeError, match="not started"):
            await engine.submit([1], greedy(1))
        async with engine:
            with pytest.raises(RuntimeError, match="started already"):
                engine.start()

    asyncio.run(run())


def test_a_decoder_of_several_ranks_is_refused() -> None:
    core = make_core()
    core.decoder.communicator = object()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="every rank"):
        AsyncLLM(core)


def test_two_loops_share_an_engine() -> None:
    """Callers may live in several threads, each with a loop of its own."""
    import threading

    core = make_core()
    engine = AsyncLLM(core)
    engine.start()
    made: dict[int, list[int]] = {}

    def caller(number: int) -> None:
        async def ask() -> None:
            for _ in range(3):
                made[number] = (await answer(await engine.submit([97 + number], greedy(8)))).token_ids

        asyncio.run(ask())

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    started = time.monotonic()
    asyncio.run(engine.close())
    assert time.monotonic() - started < 30
    assert made == {number: alone([97 + number], 8) for number in range(4)}
    assert END not in {token for tokens in made.values() for token in tokens[:-1]}
