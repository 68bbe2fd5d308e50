"""A server's engine over tensor-parallel ranks: the first rank's clients get the tokens of the whole model."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "decoder"))

from decoder_models import build, prompt
from serve_fakes import make_core

import ds_comm
from ds_comm.testing import run_ranks
from ds_inference import LLM, AsyncLLM, ConfigError, SamplingParams
from ds_inference.serve.ranks import follow, leading
from ds_inference.tp.apply import apply_tensor_parallel

PROMPTS = [prompt(length, seed) for seed, length in enumerate((30, 5, 17, 30, 1))]
LENGTHS = (6, 12, 3, 9, 20)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


async def asked(engine: AsyncLLM) -> list[list[int]]:
    """Five requests side by side, of which the first also has a second choice and one is given up."""

    async def one(tokens: list[int], length: int) -> list[int]:
        return [token async for delta in engine.generate(tokens, greedy(length)) for token in delta.tokens]

    async def given_up() -> None:
        async for _ in engine.generate(prompt(40), greedy(50)):
            return

    await asyncio.sleep(0.3)  # nothing to do: the leader says so
    found = await asyncio.gather(*map(one, PROMPTS, LENGTHS), given_up())
    two = [(delta.index, delta.tokens) async for delta in engine.generate(PROMPTS[0], greedy(6), n=2)]
    assert all([token for index, part in two for token in part if index == choice] == found[0] for choice in (0, 1))
    return found[:-1]


def served(options: dict[str, Any]) -> Any:
    model = build("llama")
    apply_tensor_parallel(model)
    core = LLM(model, max_length=128, **options).core
    with pytest.raises(ConfigError, match="leads them"):
        AsyncLLM(core)
    if ds_comm.get_rank() > 0:
        with pytest.raises(ConfigError, match="cannot lead"), leading(core):
            pass
        follow(core)
        return core.cache.num_blocks
    with pytest.raises(ConfigError, match="cannot follow"):
        follow(core)

    async def serve() -> list[list[int]]:
        async with AsyncLLM(led) as engine:
            return await asked(engine)

    with leading(core, idle_seconds=0.05) as led:
        return asyncio.run(serve())


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (2, {"max_running": 3, "max_tokens_per_step": 16, "block_size": 4}),
        (3, {"max_running": 8, "num_blocks": 30, "block_size": 4}),
    ],
    ids=["chunks", "preempted"],
)
def test_clients_of_the_first_rank(num_ranks: int, options: dict[str, Any]) -> None:
    model = build("llama")
    plain = LLM(model, max_length=128)
    expected = [plain.generate([one], greedy(length))[0].outputs[0].token_ids
                for one, length in zip(PROMPTS, LENGTHS, strict=True)]  # fmt: skip
    found = run_ranks(served, num_ranks, options, timeout=30)
    assert found[0] == expected
    assert len({*found[1:]}) == 1


def test_a_core_of_one_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="on one rank"), leading(make_core()):
        pass
    with pytest.raises(ConfigError, match="on one rank"):
        follow(make_core())
