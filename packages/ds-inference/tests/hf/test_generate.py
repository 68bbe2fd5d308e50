"""Generation with injected kernels gives transformers' own tokens: greedy and sampled, padded on either side."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hf_models import MODELS, VOCABULARY, make, padded

import ds_inference
from ds_inference import CapacityError, InferenceEngine, RequestError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, InferenceEngine]:
    """A model as transformers runs it, and the same one injected."""
    engine = ds_inference.init_inference(make(request.param), dtype="fp32", replace_with_kernel_inject=True)
    return make(request.param), engine


@pytest.fixture(scope="module")
def llama() -> tuple[Any, InferenceEngine]:
    engine = ds_inference.init_inference(make("llama"), dtype="fp32", replace_with_kernel_inject=True)
    return make("llama"), engine


def generated(model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(*args, **kwargs)


def check(pair: tuple[Any, InferenceEngine], tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    expected, found = (generated(model, tokens, **kwargs) for model in pair)
    assert found.tolist() == expected.tolist()
    return found


def test_greedy(pair: tuple[Any, InferenceEngine]) -> None:
    tokens, _ = padded([9], "left")
    for new in (1, 33, 200):
        check(pair, tokens, max_new_tokens=new, do_sample=False)


def test_left_padding(pair: tuple[Any, InferenceEngine]) -> None:
    tokens, mask = padded([9, 3, 1, 7], "left")
    check(pair, tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)
    check(pair, tokens, max_new_tokens=8, do_sample=False)  # transformers infers the mask


def test_right_padding(pair: tuple[Any, InferenceEngine]) -> None:
    tokens, mask = padded([9, 3, 1, 7], "right")
    check(pair, tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)


def test_sampling_uses_the_same_random_numbers(pair: tuple[Any, InferenceEngine]) -> None:
    tokens, mask = padded([5, 8], "left")
    kwargs = {"attention_mask": mask, "do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
    found = check(pair, tokens, max_new_tokens=20, num_return_sequences=3, **kwargs)
    assert len({tuple(row) for row in found.tolist()}) > 2


def test_rows_that_end_early_are_padded(llama: tuple[Any, InferenceEngine]) -> None:
    tokens, mask = padded([9, 3, 6, 7], "left")
    ends = list(range(30, 45))
    found = check(llama, tokens, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=ends)
    assert found.shape[1] < 49 and (found[:, 9:] == 0).any()


def test_processors_scores_and_a_minimum(llama: tuple[Any, InferenceEngine]) -> None:
    tokens, _ = padded([6], "left")
    kwargs: dict[str, Any] = {
        "max_new_tokens": 15, "min_new_tokens": 12, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2,
        "do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    expected, found = (generated(model, tokens, **kwargs) for model in llama)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(found.scores + found.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_minimum_alone(llama: tuple[Any, InferenceEngine]) -> None:
    tokens, mask = padded([6, 3], "left")
    ends = list(range(20, 50))
    for least in ({"min_new_tokens": 9}, {"min_length": 15}, {"min_new_tokens": 4, "min_length": 15}):
        kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": ends} | least
        check(llama, tokens, **kwargs)


def test_stopping_criteria_and_streamer(llama: tuple[Any, InferenceEngine]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    def at_twelve(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(tokens),), tokens.shape[1] >= 12)

    tokens, _ = padded([6], "left")
    streamer = Streamer()
    found = llama[1].generate(
        tokens, max_new_tokens=30, do_sample=False, stopping_criteria=[at_twelve], streamer=streamer
    )
    assert found.shape[1] == 12 and streamer.ended and streamer.tokens == found[0].tolist()
    assert found.tolist() == llama[0].generate(tokens, max_new_tokens=6, do_sample=False).tolist()


def test_a_cache_is_used_again(llama: tuple[Any, InferenceEngine]) -> None:
    first, _ = padded([6], "left")
    more, mask = padded([4, 9], "left")
    for tokens, extra in ((first, {}), (more, {"attention_mask": mask}), (first, {})):
        check(llama, tokens, max_new_tokens=30, do_sample=False, **extra)


def test_threads_do_not_share_a_cache(llama: tuple[Any, InferenceEngine]) -> None:
    prompts = [padded([length], "left")[0] for length in (3, 8, 15, 30)]
    asked = {"max_new_tokens": 20, "do_sample": False}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tokens: llama[1].generate(tokens, **asked).tolist(), prompts * 4))
    assert found == [llama[0].generate(tokens, **asked).tolist() for tokens in prompts] * 4


def test_a_generation_within_a_streamer(llama: tuple[Any, InferenceEngine]) -> None:
    class Nested(transformers.generation.BaseStreamer):  # type: ignore[misc]
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 3:
                llama[1].generate(padded([4], "left")[0], max_new_tokens=5)

        def end(self) -> None:
            pass

    tokens = padded([7], "left")[0]
    found = llama[1].generate(tokens, max_new_tokens=20, do_sample=False, streamer=Nested())
    assert found.tolist() == llama[0].generate(tokens, max_new_tokens=20, do_sample=False).tolist()


def test_a_copy_of_an_engine_has_no_kernels(llama: tuple[Any, InferenceEngine]) -> None:
    tokens = padded([7], "left")[0]
    llama[1].generate(tokens, max_new_tokens=5, do_sample=False)
    for copied in (copy.deepcopy(llama[1]), pickle.loads(pickle.dumps(llama[1]))):
        assert copied.decoder is None
        check((llama[0], copied), tokens, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("fused", [True, False])
def test_inference_mode_in_some_calls(fused: bool) -> None:
    model = make("llama")
    with torch.inference_mode():
        engine = ds_inference.init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
    engine.decoder.fused = fused
    tokens, _ = padded([6], "left")
    with torch.inference_mode():
        first = engine.generate(tokens, max_new_tokens=9, do_sample=False).tolist()
        logits = engine(tokens, use_cache=False).logits
    assert engine.generate(tokens, max_new_tokens=9, do_sample=False).tolist() == first
    with torch.no_grad():
        assert torch.equal(engine(tokens, use_cache=False).logits, logits)


def test_16_bits_choose_the_same_tokens_mostly() -> None:
    model, ours = make("llama").bfloat16(), make("llama")
    engine = ds_inference.init_inference(ours, dtype=torch.bfloat16, replace_with_kernel_inject=True)
    tokens, mask = padded([9, 4], "left")
    with torch.no_grad():
        expected = model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    found = engine.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert found.shape == expected.shape and engine.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.8


def test_modes_of_transformers_that_are_not_ours(
    llama: tuple[Any, InferenceEngine], caplog: pytest.LogCaptureFixture
) -> None:
    tokens, _ = padded([6], "left")
    with caplog.at_level(logging.WARNING, logger="ds_inference"):
        found = llama[1].generate(
            tokens, max_new_tokens=5, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
    assert "output_hidden_states" in caplog.text and len(found.hidden_states) == 5
    expected = llama[0].generate(tokens, max_new_tokens=5, do_sample=False)
    assert found.sequences.tolist() == expected.tolist()


def test_a_continued_cache_goes_through_the_module(llama: tuple[Any, InferenceEngine]) -> None:
    tokens, _ = padded([6], "left")
    outputs = []
    for model in llama:
        cache = model(tokens, use_cache=True).past_key_values
        longer = torch.cat([tokens, tokens[:, :1]], 1)
        outputs.append(model.generate(longer, past_key_values=cache, max_new_tokens=6, do_sample=False).tolist())
    assert outputs[0] == outputs[1]


def test_what_is_refused(llama: tuple[Any, InferenceEngine]) -> None:
    engine = llama[1]
    tokens, _ = padded([6], "left")
    with pytest.raises(NotImplementedError, match="num_beams is 4"):
        engine.generate(tokens, num_beams=4)
    with pytest.raises(RequestError, match=r"shape \(1, 0\).*at least one"):
        engine.generate(tokens[:, :0])
    with pytest.raises(RequestError, match=r"attention_mask \(1, 9\)"):
        engine.generate(tokens, attention_mask=torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(CapacityError, match=r"255 new ones are 261.*positions is 256.*fewer tokens"):
        engine.generate(tokens, max_new_tokens=255)
    small = ds_inference.init_inference(make("llama"), dtype="fp32", replace_with_kernel_inject=True, max_out_tokens=16)
    with pytest.raises(CapacityError, match=r"max_out_tokens is 16; raise it in init_inference"):
        small.generate(tokens, max_new_tokens=11)
    small.generate(tokens, max_new_tokens=10)
    with pytest.raises(CapacityError, match=r"prompt has 17 tokens, max_out_tokens is 16"):
        small.generate(torch.full((1, 17), 5), max_new_tokens=1)


def test_forward_passes(pair: tuple[Any, InferenceEngine]) -> None:
    model, engine = pair
    tokens, mask = padded([9, 4], "left")
    for kwargs in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": mask}, {"labels": tokens}):
        with torch.no_grad():
            expected, found = model(tokens, **kwargs), engine(tokens, **kwargs)
        kept = mask.bool() if "attention_mask" in kwargs else torch.ones_like(mask).bool()
        torch.testing.assert_close(found.logits[kept], expected.logits[kept], rtol=1e-4, atol=1e-5)
        assert (found.past_key_values is None) == (expected.past_key_values is None)
    assert torch.isfinite(found.loss)


def test_gradients_still_flow_through_the_module(llama: tuple[Any, InferenceEngine]) -> None:
    engine = llama[1]
    tokens = torch.randint(3, VOCABULARY, (1, 5))
    engine(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in engine.module.parameters())
    engine.module.zero_grad()


def test_pass_times(llama: tuple[Any, InferenceEngine]) -> None:
    engine = ds_inference.init_inference(make("llama"), dtype="fp32", replace_with_kernel_inject=True)
    with pytest.raises(RuntimeError, match="profile_model_time"):
        engine.model_times()
    engine.profile_model_time()
    tokens, _ = padded([6], "left")
    engine.generate(tokens, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    times = engine.model_times()
    assert len(times) == 5 and all(seconds > 0 for seconds in times) and engine.model_times() == []
