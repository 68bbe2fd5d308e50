"""`LLM`: many prompts in one call; on a pretend model, and token for token as transformers' generate on real ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_fakes import FakeDecoder, alone, greedy, make_core

from ds_inference import LLM, SamplingParams, ServingOptions
from ds_inference.errors import CheckpointError, ConfigError, LogitsError, RequestError


class TestOnAPretendModel:
    def test_texts_and_tokens_in_order(self) -> None:
        llm = LLM(make_core(num_blocks=24, max_queued=3))
        prompts = ["first", list(b"second"), "third"] * 4
        outputs = llm.generate(prompts, [greedy(length) for length in range(3, 15)])
        assert [output.prompt for output in outputs[:3]] == ["first", None, "third"]
        for length, prompt, output in zip(range(3, 15), prompts, outputs, strict=True):
            tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
            assert output.outputs[0].token_ids == alone(tokens, length)
            assert output.finished
            assert output.timing.finished is not None

    def test_one_prompt(self) -> None:
        llm = LLM(make_core())
        expected = alone(list(b"text"), 5)
        assert [one.outputs[0].token_ids for one in llm.generate("text", greedy(5))] == [expected]
        assert [one.outputs[0].token_ids for one in llm.generate(list(b"text"), greedy(5))] == [expected]
        assert llm.generate([]) == []

    def test_chat(self) -> None:
        llm = LLM(make_core())
        messages = [{"role": "user", "content": "hi"}]
        one, = llm.chat(messages, greedy(5))  # fmt: skip
        two = llm.chat([messages, messages], greedy(5))
        assert one.prompt == "user: hi\n"
        assert [output.text for output in two] == [one.text] * 2

    def test_seed_of_the_engine(self) -> None:
        params = SamplingParams(max_tokens=8, temperature=3.0, ignore_eos=True)

        def drawn(seed: int | None) -> list[list[int]]:
            return [one.outputs[0].token_ids for one in LLM(make_core(), seed=seed).generate(["a"] * 3, params)]

        assert drawn(1) == drawn(1) != drawn(2)
        assert drawn(None) != drawn(None)
        assert len({tuple(tokens) for tokens in drawn(1)}) == 3

    def test_progress_is_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        LLM(make_core()).generate(["a", "b"], greedy(3), use_tqdm=True)
        assert capsys.readouterr().out != ""

    def test_a_wrong_prompt_is_named_before_anything_is_computed(self) -> None:
        core = make_core()
        with pytest.raises(RequestError, match=r"prompt 1: .*vocabulary"):
            LLM(core).generate([[1], [10**6]], greedy(3))
        assert core.stats.steps == 0

    def test_a_failure_leaves_nothing_behind(self) -> None:
        core = make_core()
        assert isinstance(core.decoder, FakeDecoder)
        core.decoder.broken = lambda text: bytes(text[:3]) == b"bad"
        llm = LLM(core)
        with pytest.raises(LogitsError):
            llm.generate(["good", "bad"], greedy(30, ignore_eos=True))
        assert not core.has_work
        assert llm.generate("good", greedy(4))[0].outputs[0].token_ids == alone(list(b"good"), 4)

    def test_wrong_use(self) -> None:
        llm = LLM(make_core())
        with pytest.raises(RequestError, match="2 sampling values for 1 prompts"):
            llm.generate("a", [greedy(1), greedy(1)])
        llm.core.codec = None
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate("a")


class TestOptions:
    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"max_runing": 3}, "'max_runing' is unknown"),
            ({"max_running": 0}, "max_running is 0"),
            ({"num_blocks": True}, "num_blocks is True"),
            ({"max_running": 64, "max_tokens_per_step": 32}, "at least max_running"),
            ({"dtype": "int7"}, "dtype is 'int7'"),
        ],
    )
    def test_wrong_values(self, values: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            ServingOptions.of(values)


def tiny_model(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def generated(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = torch.tensor([prompt])
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False)
    return made[0, len(prompt) :].tolist()


class TestAgainstGenerate:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"prefix_caching": False},
            {"num_blocks": 14, "block_size": 8},
            {"max_tokens_per_step": 4, "max_running": 4},
            {"max_running": 3, "max_tokens_per_step": 7, "num_blocks": 20, "block_size": 5},
        ],
        ids=["plain", "no-prefix-cache", "preemption", "split-prompts", "all"],
    )
    def test_greedy_in_any_company(self, options: dict[str, Any]) -> None:
        model = tiny_model()
        chance = random.Random(len(options))
        beginning = [chance.randrange(3, 160) for _ in range(33)]
        prompts = [
            beginning[: chance.choice([0, 9, 18, 33])]
            + [chance.randrange(3, 160) for _ in range(chance.randrange(1, 30))]
            for _ in range(16)
        ]
        lengths = [chance.randrange(1, 50) for _ in prompts]
        expected = [generated(model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        llm = LLM(model, **options)
        core = llm.core
        made: dict[str, list[int]] = {}
        order = list(range(len(prompts)))
        chance.shuffle(order)
        while order or core.has_work:
            for _ in range(chance.randrange(3)):
                if order:
                    number = order.pop()
                    core.add(str(number), prompts[number], greedy(lengths[number]), stream=number % 2 == 0)
            for delta in core.step() if core.has_work else []:
                made.setdefault(delta.job_id, []).extend(delta.tokens)
        assert [made[str(number)] for number in range(len(prompts))] == expected
        if options.get("num_blocks") == 14:
            assert core.scheduler.num_preemptions > 0
        if options == {}:
            assert core.scheduler.num_cached_tokens > 0

    def test_sampling_is_a_request_s_own(self) -> None:
        model = tiny_model()
        params = SamplingParams(max_tokens=20, temperature=1.2, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=3)
        prompt = [5, 6, 7, 8]
        one = LLM(model).generate([prompt], params)[0].outputs[0].token_ids
        others = [[number] * 9 for number in range(10, 20)]
        many = LLM(model, num_blocks=20, max_running=4).generate([*others, prompt], params, n=2)
        assert many[-1].outputs[0].token_ids == one
        assert many[-1].outputs[1].token_ids != one

    def test_logprobs_are_the_model_s(self) -> None:
        model = tiny_model()
        prompt = [5, 6, 7, 8]
        answer = LLM(model).generate([prompt], greedy(6, logprobs=3, ignore_eos=True))[0].outputs[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.token_ids])).logits[0].log_softmax(-1)
        assert answer.logprobs is not None
        for at, sampled in enumerate(answer.logprobs):
            row = logits[len(prompt) + at - 1]
            assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=1e-4)
            assert [value for _, value in sampled.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)

    def test_the_end_token_of_the_generation_config(self) -> None:
        model = tiny_model()
        prompt = [5, 6, 7, 8]
        end = generated(model, prompt, 8)[5]
        model.generation_config.eos_token_id = [end]
        answer = LLM(model).generate([prompt], greedy(20))[0].outputs[0]
        assert answer.token_ids == generated(model, prompt, 20)
        assert (answer.finish_reason, answer.stop) == ("stop", end)

    def test_limits_of_model_and_cache(self) -> None:
        model = tiny_model()
        with pytest.raises(ConfigError, match=r"max_length is 500.*128"):
            LLM(model, max_length=500)
        with pytest.raises(ConfigError, match="one block needs"):
            LLM(model, cache_nbytes=10)
        blocks = LLM(model, cache_nbytes=10**6, block_size=8).core.scheduler.blocks
        nbytes = 2 * 2 * 2 * 12 * 4 * 8  # keys and values, layers, heads, their dimension, fp32, tokens
        assert blocks.num_blocks == 10**6 // nbytes
        with pytest.raises(RequestError, match="at most 127"):
            LLM(model).generate([[5] * 128], greedy(1))

    def test_quantised(self) -> None:
        answer = LLM(tiny_model(), quantization="int8").generate([[5, 6, 7]], greedy(8, ignore_eos=True))[0]
        assert len(answer.outputs[0].token_ids) == 8
        with pytest.raises(ConfigError, match="int5"):
            LLM(tiny_model(), quantization="int5")

    def test_from_a_folder(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        model = tiny_model()
        model.save_pretrained(tmp_path)
        words = {f"w{number}": number for number in range(160)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2").save_pretrained(tmp_path)
        answer = LLM(tmp_path, dtype="float32").generate("w5 w6 w7", greedy(6))[0]
        assert answer.outputs[0].token_ids == generated(model, [5, 6, 7], 6)
        assert answer.text.split() == [f"w{token}" for token in answer.outputs[0].token_ids if token != 2]

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(CheckpointError, match="is not there"):
            LLM(tmp_path / "missing")
        with pytest.raises(CheckpointError, match="cannot be read"):
            LLM(tmp_path)
