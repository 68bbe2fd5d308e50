"""Every family: logits and greedy tokens of the decoder are those of transformers, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from decoder_models import MODELS, Sequences, build, distance, logits_of, prompt

from ds_inference import Decoder, read_decoder

pytest.importorskip("transformers")

CLOSE = 1e-5
FAMILIES = sorted(MODELS)
Read = Callable[[Any], Decoder]


@pytest.fixture(params=[4, 64], ids=["paged", "static"])
def block_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture(params=["program", "operations"])
def read(request: pytest.FixtureRequest) -> Iterator[Read]:
    """read_decoder, with steps of decoding as one program or not."""
    fused = request.param == "program"
    if fused and find_spec("numba") is None:
        pytest.skip("programs need numba")
    decoders = []

    def made(model: Any) -> Decoder:
        decoder = read_decoder(model)
        decoder.fused = fused
        decoders.append(decoder)
        return decoder

    yield made
    assert all(decoder.fused == fused for decoder in decoders), "fell back"


def room(decoder: Decoder, block_size: int, sequences: int = 3) -> Sequences:
    return Sequences(decoder, block_size, sequences * 64 // block_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_chunks_and_single_tokens(family: str, block_size: int, read: Read) -> None:
    model = build(family)
    tokens = prompt(23)
    expected = logits_of(model, tokens)
    held = room(read(model), block_size)
    for low, high in ((0, 9), (9, 16), (16, 17), (17, 18), (18, 23)):
        found = held.step({0: tokens[low:high]}, last=False)
        assert found.dtype == torch.float32
        assert distance(found, expected[low:high]) < CLOSE, (low, high)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_of_prompts_chunks_and_decoding(family: str, block_size: int, read: Read) -> None:
    model = build(family)
    texts = {0: prompt(14), 1: prompt(5), 2: prompt(30)}
    expected = {key: logits_of(model, text) for key, text in texts.items()}
    held = room(read(model), block_size)
    held.step({2: texts[2][:11]})
    found = held.step({0: texts[0][:13], 1: texts[1], 2: texts[2][11:29]})
    places = ((0, 12), (1, 4), (2, 28))
    for row, (key, place) in enumerate(places):
        assert distance(found[row], expected[key][place]) < CLOSE, key
    found = held.step({2: texts[2][29:], 0: texts[0][13:]})
    assert distance(found[0], expected[2][29]) < CLOSE
    assert distance(found[1], expected[0][13]) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, read: Read) -> None:
    model = build(family)
    asked, count = prompt(17), 40
    expected = model.generate(torch.tensor([asked]), max_new_tokens=count, do_sample=False)[0, len(asked) :].tolist()
    held = room(read(model), 16)
    assert greedy(held, asked, count) == expected


def test_two_hundred_greedy_tokens(read: Read) -> None:
    model = build("llama")
    asked, count = prompt(30), 200
    expected = model.generate(torch.tensor([asked]), max_new_tokens=count, do_sample=False)[0, len(asked) :].tolist()
    decoder = read(model)
    for block_size, blocks in ((16, 16), (230, 1)):
        assert greedy(Sequences(decoder, block_size, blocks), asked, count) == expected


def greedy(held: Sequences, asked: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    new = asked
    for _ in range(count):
        new = [int(held.step({0: new})[0].argmax())]
        tokens += new
    return tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sixteen_bits_are_as_near_as_transformers(family: str, dtype: torch.dtype, read: Read) -> None:
    tokens = prompt(40)
    exact, model = logits_of(build(family), tokens), build(family, dtype)
    theirs = distance(logits_of(model, tokens), exact)
    held = room(read(model), 16)
    found = [held.step({0: tokens[:36]}, last=False), *(held.step({0: [token]}) for token in tokens[36:])]
    assert distance(torch.cat(found), exact) < 1.5 * theirs


SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 4.0},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_scalings_of_the_rotary_embedding(scaling: dict[str, float]) -> None:
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    tokens = prompt(60)
    expected = logits_of(model, tokens)
    assert distance(room(read_decoder(model), 16).step({0: tokens}, last=False), expected) < CLOSE


def test_frequencies_that_depend_on_the_length_limit_it() -> None:
    half = 8
    scaling = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.5] * half, "long_factor": [4.0] * half,
        "original_max_position_embeddings": 50,
    }  # fmt: skip
    model = build("phi3", rope_parameters=scaling, hidden_size=96, original_max_position_embeddings=50)
    decoder = read_decoder(model)
    assert decoder.max_positions == 50
    tokens = prompt(50)
    assert distance(room(decoder, 16).step({0: tokens}, last=False), logits_of(model, tokens)) < CLOSE
    with pytest.raises(IndexError):
        room(decoder, 16).step({0: prompt(51)})


def test_cast_rotary_frequencies_are_not_used() -> None:
    """A model cast to 16 bits has 16-bit frequencies, which are off by whole turns after some hundred tokens."""
    exact = read_decoder(build("llama")).model.layers[0].rope
    cast = read_decoder(build("llama", torch.bfloat16)).model.layers[0].rope
    assert exact is not None
    assert cast is not None
    assert torch.equal(exact.cos, cast.cos)
    assert torch.equal(exact.sin, cast.sin)
