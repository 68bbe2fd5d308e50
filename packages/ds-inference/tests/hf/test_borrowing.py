"""Models that are only lent: the decoder of a trained model's own memory, which stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import MODELS, make, padded
from torch import nn

from ds_inference import ModelError, QuantizationSpec, read_decoder
from ds_inference.decoder import Borrowing
from ds_inference.generate_call import with_loop
from ds_inference.generation import DecodeLoop

pytest.importorskip("transformers")


def flat(model: nn.Module) -> torch.Tensor:
    """Put all parameters into one buffer, one after the other, as a training engine does."""
    parameters = list(model.parameters())
    buffer = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return buffer


def tokens_of(model: Any, decoder: Any) -> list[list[int]]:
    tokens, mask = padded([9, 4], "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    return model.generate(tokens, **with_loop(kwargs, DecodeLoop(decoder, 100))).tolist()


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("in_one_buffer", [True, False])
def test_a_lent_model_stays_as_it_was(name: str, in_one_buffer: bool) -> None:
    model = make(name)
    if in_one_buffer:
        flat(model)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    decoder = read_decoder(model, borrowing=Borrowing())
    tokens, mask = padded([9, 4], "left")
    expected = make(name).generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert tokens_of(model, decoder) == expected.tolist()
    assert (decoder.copied_nbytes == 0) == (in_one_buffer and name != "gpt2")
    decoder.revert()
    for (place, value), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, value)


def test_views_see_updates() -> None:
    model = make("llama")
    flat(model)
    decoder = read_decoder(model, borrowing=Borrowing())
    other = make("llama", seed=3)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
    assert tokens_of(model, decoder) == tokens_of(other, read_decoder(other))


class Adapter(nn.Module):
    """A layer as PEFT's, by what it has."""

    def __init__(self, layer: nn.Linear, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"one": nn.Linear(layer.in_features, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"one": nn.Linear(3, layer.out_features, bias=False)})
        self.scaling, self.active_adapters = {"one": 1.5}, ["one"]
        for key, value in more.items():
            setattr(self, key, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1.5 * self.lora_B["one"](self.lora_A["one"](x))


def test_adapters_are_fused_into_copies() -> None:
    model = make("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    tokens, mask = padded([9, 4], "left")
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False).tolist()
    assert expected != tokens_of(make("llama"), read_decoder(make("llama")))
    assert tokens_of(model, read_decoder(model, borrowing=Borrowing())) == expected
    attention.v_proj.disable_adapters = True
    assert tokens_of(model, read_decoder(model, borrowing=Borrowing())) != expected


def test_what_cannot_be_lent_is_refused() -> None:
    model = make("llama")
    with pytest.raises(ModelError, match="leave quantization out"):
        read_decoder(model, QuantizationSpec.parse("int8"), borrowing=Borrowing())
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="forward hook"):
        read_decoder(model, borrowing=Borrowing())
    read_decoder(model, borrowing=Borrowing(ignores=lambda hook: True))
    handle.remove()
    layer = model.model.layers[0].self_attn
    layer.q_proj = Adapter(layer.q_proj, lora_magnitude_vector={"one": 1})
    with pytest.raises(ModelError, match="plain LoRA"):
        read_decoder(model, borrowing=Borrowing())
