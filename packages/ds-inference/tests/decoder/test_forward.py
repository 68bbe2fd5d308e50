"""The forward pass over decoders made by hand against the specification of ds-kernels; no model of transformers."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from decoder_models import Sequences, distance, prompt
from torch import Tensor

from ds_inference import Decoder
from ds_kernels import DecodeLayer, DecodeModel, Norm, Projection, RopeTable, decode, quantize_weight, use_backend

VOCABULARY, HIDDEN, HEADS, KV_HEADS, DIM, INNER, POSITIONS = 99, 40, 6, 2, 16, 52, 128


def made(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def norm(features: int = HIDDEN, kind: Any = "rms") -> Norm:
    return Norm(1 + 0.1 * torch.randn(features), 0.1 * torch.randn(features) if kind == "layer" else None, 1e-5, kind)


def small(layers: int = 3, **fields: Any) -> DecodeModel:
    torch.manual_seed(0)
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    rope = RopeTable(angles.cos().float(), angles.sin().float())
    embedding = made(VOCABULARY, HIDDEN)
    made_layers = [
        DecodeLayer(
            norm(),
            Projection(made((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)),
            Projection(made(HIDDEN, HEADS * DIM)),
            norm(),
            Projection(made(2 * INNER, HIDDEN)),
            Projection(made(HIDDEN, INNER)),
            rope=rope,
            window=7 if number == 1 else None,
        )
        for number in range(layers)
    ]
    model = DecodeModel(
        embedding, made_layers, norm(), Projection(embedding), HEADS, KV_HEADS, DIM, activation="silu", gated=True
    )
    return dataclasses.replace(model, **fields)


def changed(model: DecodeModel, **fields: Any) -> DecodeModel:
    return dataclasses.replace(model, layers=[dataclasses.replace(layer, **fields) for layer in model.layers])


def ungated(model: DecodeModel) -> DecodeModel:
    return changed(dataclasses.replace(model, gated=False), up=Projection(made(INNER, HIDDEN), made(INNER)))


def sandwich(model: DecodeModel) -> DecodeModel:
    return changed(
        model, query_norm=norm(DIM), key_norm=norm(DIM), attention_out_norm=norm(), mlp_out_norm=norm(kind="layer")
    )


VARIANTS = {
    "plain": small(),
    "layer norms beside one another": changed(small(), attention_norm=norm(kind="layer"), mlp_norm=None),
    "layer norms": changed(small(), attention_norm=norm(kind="layer"), mlp_norm=norm(kind="layer")),
    "more norms": sandwich(small()),
    "gelu": small(activation="gelu"),
    "gelu_tanh": small(activation="gelu_tanh"),
    "relu": small(activation="relu"),
    "ungated silu": ungated(small()),
    "ungated gelu": ungated(small(activation="gelu")),
    "ungated relu": ungated(small(activation="relu")),
    "biases": changed(
        small(), qkv=Projection(made((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), made((HEADS + 2 * KV_HEADS) * DIM)),
        output=Projection(made(HIDDEN, HEADS * DIM), made(HIDDEN)), down=Projection(made(HIDDEN, INNER), made(HIDDEN)),
    ),
    "soft caps and scales": small(
        attention_softcap=2.0, logit_softcap=1.5, attention_scale=0.3, embedding_scale=3.7
    ),
    "learned positions": changed(small(positions=made(POSITIONS + 2, HIDDEN), position_offset=2), rope=None),
    "quantised": changed(small(), qkv=Projection(quantize_weight(made((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)))),
    "untied head with a bias": small(head=Projection(made(VOCABULARY, HIDDEN), made(VOCABULARY))),
}  # fmt: skip


def specified(model: DecodeModel, tokens: list[int]) -> Tensor:
    """Logits of every token by the specification, one after the other."""
    held = Sequences(Decoder(model), 8, 8)
    table = torch.arange(8, dtype=torch.int32)[None]
    rows = []
    with use_backend("reference"):
        for place, token in enumerate(tokens):
            inputs = (torch.tensor([token]), torch.tensor([place]), torch.tensor([place]), table)
            length = torch.tensor([place + 1], dtype=torch.int32)
            rows.append(decode(model, *inputs, length, held.cache.k, held.cache.v))
    return torch.cat(rows)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.cpu_extra)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_as_specified(variant: str, fused: bool) -> None:
    if fused and find_spec("numba") is None:
        pytest.skip("programs need numba")
    model, tokens = VARIANTS[variant], prompt(19)
    expected = specified(model, tokens)
    decoder = Decoder(model)
    decoder.fused = fused
    held = Sequences(decoder, 4, 12)
    close = 1e-4 if variant == "quantised" else 1e-5  # programs hold activations of quantised weights to 16 bits
    assert distance(held.step({0: tokens[:10]}, last=False), expected[:10]) < 1e-5
    assert distance(held.step({1: tokens[:18], 0: tokens[10:17]})[:, :90], expected[[17, 16], :90]) < 1e-5
    assert distance(held.step({0: tokens[17:18], 1: tokens[18:]}), expected[[17, 18]]) < close
    assert decoder.fused == fused


def halved(part: Any) -> Any:
    """The same model in bf16, angles aside."""
    if isinstance(part, Tensor):
        return part.bfloat16()
    if isinstance(part, list):
        return [halved(each) for each in part]
    if not dataclasses.is_dataclass(part) or isinstance(part, (RopeTable, type)):
        return part
    return dataclasses.replace(
        part, **{field.name: halved(getattr(part, field.name)) for field in dataclasses.fields(part)}
    )


@pytest.mark.parametrize("variant", ["plain", "untied head with a bias"])
def test_logits_of_16_bit_weights_are_not_rounded(variant: str) -> None:
    model, tokens = halved(VARIANTS[variant]), prompt(19)
    decoder = Decoder(model)
    decoder.fused = False
    logits = Sequences(decoder, 4, 12).step({0: tokens})
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).any()
    assert distance(logits, specified(model, tokens)[-1:]) < 0.02


@pytest.mark.cpu_extra
@pytest.mark.skipif(find_spec("numba") is None, reason="programs need numba")
def test_a_program_lives_as_long_as_its_cache() -> None:
    decoder = Decoder(small())
    held = Sequences(decoder, 16, 2)
    first = held.step({0: [5]})
    kept = first.clone()
    held.step({0: [6]})
    assert torch.equal(first, kept), "logits are the caller's own"
    assert len(decoder._programs) == 1
    cache = weakref.ref(held.cache)
    del held
    gc.collect()
    assert cache() is None
    assert len(decoder._programs) == 0


def test_what_no_program_can_run_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = small()
    finally:
        torch.set_default_dtype(torch.float32)
    tokens = prompt(6)
    held = Sequences(Decoder(model), 4, 4)
    with caplog.at_level(logging.WARNING, "ds_inference"):
        found = torch.cat([held.step({0: [token]}) for token in tokens])
    assert distance(found, specified(model, tokens)) < 1e-6
    assert not held.decoder.fused
    assert [record.levelname for record in caplog.records if "as one program" in record.message] == ["WARNING"]
