"""Injection into transformers models: checked, refused without a trace, taken out to the bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import MODELS, make, padded
from torch import nn

import ds_inference
from ds_inference import ModelError, QuantizedLinear, init_inference
from ds_inference.inject import (
    generic_injection,
    injection_of,
    policies,
    replace_transformer_layer,
    revert,
    revert_transformer_layer,
)

transformers = pytest.importorskip("transformers")
_BERT = {
    "vocab_size": 59, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "max_position_embeddings": 64,
}  # fmt: skip
_DISTIL = {"vocab_size": 59, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "max_position_embeddings": 64}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _BERT),
    "bert-head": ("BertForSequenceClassification", _BERT),
    "roberta": ("RobertaModel", {**_BERT, "pad_token_id": 1}),
    "electra": ("ElectraModel", _BERT),
    "distilbert": ("DistilBertModel", _DISTIL),
}


def encoder(name: str) -> Any:
    kind, sizes = ENCODERS[name]
    torch.manual_seed(0)
    found = getattr(transformers, kind)
    return found(found.config_class(**sizes)).eval()


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return list(state) == list(model.state_dict()) and all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )


def own_storage(model: nn.Module) -> bool:
    return all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_come_back_to_the_bit(name: str) -> None:
    model, original = make(name), make(name)
    assert replace_transformer_layer(None, model, None, {"dtype": "fp32"}, model.config) is model
    assert injection_of(model) is not None and same_weights(model, original)
    revert_transformer_layer(None, model)
    assert injection_of(model) is None and same_weights(model, original) and own_storage(model)
    tokens, _ = padded([7], "left")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    with pytest.raises(ModelError, match="no injected kernels"):
        revert_transformer_layer(None, model)
    init_inference(model, dtype="fp32", replace_with_kernel_inject=True).destroy()
    assert same_weights(model, original) and own_storage(model)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders_compute_what_they_did(name: str) -> None:
    original, engine = encoder(name), init_inference(encoder(name), dtype="fp32", replace_with_kernel_inject=True)
    assert len(engine.injection.replaced["encoder layer"]) == 2
    torch.manual_seed(1)
    tokens = torch.randint(2, 59, (3, 11))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    for kwargs in ({}, {"attention_mask": mask}, {"output_hidden_states": True}):
        with torch.no_grad():
            expected, found = original(tokens, **kwargs), engine(tokens, **kwargs)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        hidden = expected.get("hidden_states") or ()
        for ours, theirs in zip(found.get("hidden_states") or (), hidden, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    engine(tokens)[0].sum().backward()  # gradients of the weights: each layer by itself
    assert all(p.grad is not None for n, p in engine.module.named_parameters() if ".query." in n or ".q_lin." in n)
    engine.destroy()
    assert same_weights(engine.module, original) and own_storage(engine.module)


def test_a_copy_has_no_injection() -> None:
    for model in (make("llama"), encoder("bert")):
        engine = init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
        other = copy.deepcopy(engine.module)
        assert injection_of(other) is None
        tokens = torch.randint(3, 50, (1, 5))
        with torch.no_grad():
            torch.testing.assert_close(other(tokens)[0], model(tokens)[0], rtol=1e-5, atol=1e-5)


def test_twice_and_unknown_ones_are_refused() -> None:
    model = make("llama")
    init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
    with pytest.raises(ModelError, match="already"):
        init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ModelError, match=r"model type 't5'.*llama.*bert.*leave|Leave"):
        init_inference(t5, dtype="fp32", replace_with_kernel_inject=True)
    with pytest.raises(ModelError, match="no GRU"):
        replace_transformer_layer(nn.GRU, make("llama"), None, None, None)
    with pytest.raises(ModelError, match="model_config is another one"):
        replace_transformer_layer(None, make("llama"), None, None, make("gpt2").config)


def test_a_model_that_would_change_is_refused_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was altered in a way that no name shows: the self-check sees it."""
    model = make("llama")
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("LlamaMLP", (type(mlp),), {"forward": lambda self, x: 1.5 * super(type(mlp), self).forward(x)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"differ by .* leave"):
        init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
    assert injection_of(model) is None and own_storage(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_decoders(bits: str) -> None:
    engine = init_inference(make("llama"), dtype="fp32", replace_with_kernel_inject=True, quantization=bits)
    plain = make("llama")
    ds_inference.quantize_model(plain, ds_inference.QuantizationSpec.parse(bits))
    assert isinstance(engine.module.model.layers[0].mlp.down_proj, QuantizedLinear)
    tokens, mask = padded([9, 4], "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert engine.generate(tokens, **kwargs).tolist() == plain.generate(tokens, **kwargs).tolist()


def test_any_module_that_has_known_ones_in_it() -> None:
    whole = nn.ModuleDict({"text": encoder("bert"), "other": nn.Linear(4, 4)})
    tokens = torch.randint(2, 59, (2, 6))
    with torch.no_grad():
        expected = whole["text"](tokens)[0]
        assert len(generic_injection(whole)["encoder layer"]) == 2
        torch.testing.assert_close(whole["text"](tokens)[0], expected, rtol=1e-5, atol=1e-5)
    assert revert(whole) and not revert(whole)


def test_policies_say_what_is_known() -> None:
    kinds = {policy.model_type: policy.kind for policy in policies}
    assert kinds["llama"] == "decoder" and kinds["bert"] == "encoder"
    with pytest.raises(dataclasses.FrozenInstanceError):
        policies[0].kind = "other"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_meta_models_are_filled_from_folders(name: str, tmp_path: Path) -> None:
    original = make(name)
    original.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = type(original)(original.config)
    engine = init_inference(model, dtype="fp32", checkpoint=str(tmp_path), replace_with_kernel_inject=True)
    assert same_weights(engine.module, original)
    tokens, _ = padded([7], "left")
    expected = original.generate(tokens, max_new_tokens=12, do_sample=False)
    assert engine.generate(tokens, max_new_tokens=12, do_sample=False).tolist() == expected.tolist()
