"""Decoders of tensor-parallel ranks: every rank has the logits of the whole model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from decoder_models import VOCABULARY, Sequences, build, distance, logits_of, prompt

from ds_comm.testing import run_ranks
from ds_inference import ModelError, read_decoder
from ds_inference.quantization import QuantizationSpec
from ds_inference.tp.apply import apply_tensor_parallel

CLOSE = 1e-5


def same_as_whole(family: str, changes: dict[str, Any]) -> None:
    tokens = prompt(21)
    expected = logits_of(build(family, **changes), tokens)
    model = build(family, **changes)
    apply_tensor_parallel(model)
    decoder = read_decoder(model)
    assert decoder.communicator is not None
    assert decoder.vocab_size == VOCABULARY
    held = Sequences(decoder, 4, 20)
    for low, high in ((0, 13), (13, 19), (19, 20), (20, 21)):
        assert distance(held.step({0: tokens[low:high]}, last=False), expected[low:high]) < CLOSE
    assert distance(logits_of(model, tokens), expected) < CLOSE
    decoder.revert()
    assert distance(logits_of(model, tokens), expected) < CLOSE


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma2", "phi", "phi3", "gpt2", "opt"])
def test_logits_are_those_of_the_whole_model(family: str, num_ranks: int) -> None:
    run_ranks(same_as_whole, num_ranks, family, {})


def test_key_heads_that_ranks_have_copies_of() -> None:
    run_ranks(same_as_whole, 4, "llama", {"num_key_value_heads": 1})


def refused() -> None:
    model = build("llama")
    apply_tensor_parallel(model)
    with pytest.raises(ModelError, match="split over tensor-parallel ranks"):
        read_decoder(model, QuantizationSpec())


def test_quantised_parts_are_refused() -> None:
    run_ranks(refused, 2)
