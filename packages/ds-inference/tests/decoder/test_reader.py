"""What reading a model leaves of it, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import MODELS, Sequences, build, distance, logits_of, prompt
from torch import nn

from ds_inference import KVCache, ModelError, read_decoder

pytest.importorskip("transformers")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_read_model_is_the_same_model(family: str) -> None:
    model = build(family)
    before, logits = state(model), logits_of(model, prompt(9))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    read_decoder(model)
    assert same(before, model.state_dict())
    assert torch.equal(logits, logits_of(model, prompt(9)))
    held = {storage(parameter): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    assert sum(held.values()) == nbytes, "the fused weights are the only copy"


@pytest.mark.parametrize("family", sorted(MODELS))
def test_revert_gives_every_parameter_its_own_memory_back(family: str) -> None:
    model = build(family)
    before = state(model)
    layout = [(parameter.stride(), parameter.untyped_storage().nbytes()) for parameter in model.parameters()]
    decoder = read_decoder(model)
    decoder.revert()
    assert same(before, model.state_dict())
    assert [(p.stride(), p.untyped_storage().nbytes()) for p in model.parameters()] == layout
    assert len({storage(parameter) for parameter in model.parameters()}) == len(layout)
    decoder.revert()
    with pytest.raises(RuntimeError, match="read the model again"):
        decoder.model
    tokens = prompt(12)
    held = Sequences(read_decoder(model), 16, 2)
    assert distance(held.step({0: tokens}, last=False), logits_of(model, tokens)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_the_model_still_trains_and_the_decoder_sees_it(family: str) -> None:
    model = build(family)
    twin = copy.deepcopy(model)
    decoder = read_decoder(model)
    tokens = torch.tensor([prompt(20)])
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    held = Sequences(decoder, 16, 2)
    assert distance(held.step({0: prompt(20)}, last=False), logits_of(twin, prompt(20))) < 1e-5


def cast(model: nn.Module) -> None:
    model.bfloat16()


def replace(model: nn.Module) -> None:
    model.load_state_dict(state(model), assign=True)


@pytest.mark.parametrize("change", [cast, replace])
def test_a_model_that_left_its_decoder_is_noticed(change: Any) -> None:
    model = build("llama")
    decoder = read_decoder(model)
    model.load_state_dict(state(model))
    held = Sequences(decoder, 16, 2)
    held.step({0: prompt(4)})
    change(model)
    with pytest.raises(RuntimeError, match=r"Embedding\.weight was moved, cast or replaced"):
        held.step({0: prompt(4)})


def test_a_read_model_can_be_saved(tmp_path: Path) -> None:
    model = build("llama")
    read_decoder(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same(state(model), again.state_dict())


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear has the model type None; known are llama, .*opt"):
        read_decoder(nn.Linear(2, 2))


def test_a_parameter_that_nobody_knows_is_refused_and_nothing_changed() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.extra = nn.Parameter(torch.zeros(3))
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.extra: a llama decoder has no such parameter"):
        read_decoder(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


class Doubled(nn.Linear):
    pass


def replaced(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = Doubled(52, 36)


def hooked(model: Any) -> None:
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *_: None)


def without_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(36)


def one_bias(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.bias = None


def another_dtype(model: Any) -> None:
    model.model.layers[0].mlp.to(torch.bfloat16)


def on_meta(model: Any) -> None:
    model.to("meta")


def without_layers(model: Any) -> None:
    del model.model.layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced, r"layers\.0\.mlp\.down_proj is a Doubled; expected a torch Linear"),
        (hooked, r"layers\.2\.self_attn\.q_proj has a forward hook"),
        (without_norm, r"model\.norm is a LayerNorm; expected an RMS norm"),
        (one_bias, r"q_proj, .*k_proj, .*v_proj have a bias only in part"),
        (another_dtype, r"layer 0: up is torch\.bfloat16 .*expected torch\.float32"),
        (on_meta, "is on the meta device; load"),
        (without_layers, "has no module 'layers'"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    model = build("llama")
    change(model)
    with pytest.raises(ModelError, match=message):
        read_decoder(model)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "opt with do_layer_norm_before=False computes something else"),
        ("opt", {"word_embed_proj_dim": 24}, r"project_(in|out)\.weight"),
        ("opt", {"layer_norm_elementwise_affine": False}, r"layer_norm\.weight is None"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"h\.1\.attn\.scaling is .*expected one"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("llama", {"hidden_act": "leaky_relu"}, "hidden_act is 'leaky_relu'; known are silu"),
    ],
)
def test_configurations_that_compute_something_else_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_decoder(build(family, **changes))


def test_copied_blocks_hold_the_same_keys_and_values() -> None:
    decoder = read_decoder(build("llama"))
    held = Sequences(decoder, 4, 6)
    tokens = prompt(8)
    held.step({0: tokens})
    first, second = held.blocks[0]
    spare = held.free[:2]
    held.cache.copy([(first, spare[0]), (second, spare[1])])
    held.cache.copy([])
    held.blocks[1], held.lengths[1] = [*spare, held.free.pop()], 8
    assert distance(held.step({1: [5]}), logits_of(build("llama"), [*tokens, 5])[-1:]) < 1e-5
    assert held.cache.nbytes == 6 * 4 * KVCache.bytes_per_token(decoder)


def test_cache_sizes_are_checked() -> None:
    decoder = read_decoder(build("llama"))
    with pytest.raises(ValueError, match="0 blocks of 4 tokens"):
        KVCache(decoder, 0, 4)
