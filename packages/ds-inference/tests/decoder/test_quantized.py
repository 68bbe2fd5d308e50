"""Decoders over quantised weights: what the layers of the same model compute, whichever way they were quantised."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_models import Sequences, build, distance, logits_of, prompt
from torch import nn

from ds_inference import ModelError, read_decoder
from ds_inference.decoder.quantized import join, split
from ds_inference.quantization import QuantizationSpec, QuantizedLinear, WeightFormat, quantize_model
from ds_kernels import quantize_weight

SPECS = {
    "int8": QuantizationSpec.parse("int8"),
    "int4": QuantizationSpec.parse("int4"),
    "int8-int8": QuantizationSpec.parse({"bits": 8, "activation_bits": 8}),
    "part": QuantizationSpec(exclude=("mlp", "head")),
}


@pytest.mark.parametrize("rows", [[16, 32, 5], [7, 16, 9], [33]])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_joined_rows_keep_their_codes(rows: list[int], symmetric: bool, bits: int) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(count, 70) for count in rows]
    format_ = WeightFormat(bits, 32, symmetric)
    joined = join([format_.apply(part) for part in parts])
    whole = quantize_weight(torch.cat(parts), bits, group_size=32, symmetric=symmetric)
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert joined.codes.shape == whole.codes.shape
    views = split(joined, rows)
    assert (views is None) == any(count % 16 for count in rows[:-1])
    for view, part in zip(views or [], parts, strict=False):
        assert torch.equal(view.dequantize(), format_.apply(part).dequantize())
        assert view.codes.untyped_storage().data_ptr() == joined.codes.untyped_storage().data_ptr()


def dequantized(model: nn.Module) -> nn.Module:
    """The same with dense layers of the quantised values."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight.data = module.quantized.dequantize()
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, layer)
    return dense


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi3", "opt"])
def test_quantised_on_the_way_or_before_is_the_same(family: str, spec: str) -> None:
    pytest.importorskip("transformers")
    quantization = SPECS[spec]
    assert quantization is not None
    model, before = build(family), build(family)
    decoder = read_decoder(model, quantization)
    quantize_model(before, quantization)
    tokens = prompt(20)
    found = Sequences(decoder, 16, 2).step({0: tokens}, last=False)
    assert torch.equal(found, Sequences(read_decoder(before), 16, 2).step({0: tokens}, last=False))
    assert distance(found, logits_of(model, tokens)) < 1e-5
    if quantization.activation_bits is None:
        assert distance(found, logits_of(dequantized(model), tokens)) < 1e-5


def test_codes_are_held_once_and_given_back() -> None:
    pytest.importorskip("transformers")
    model = build("llama")
    decoder = read_decoder(model, SPECS["int8"])
    attention = model.model.layers[0].self_attn
    queries, keys = attention.q_proj, attention.k_proj
    assert isinstance(queries, QuantizedLinear)
    assert queries.codes.untyped_storage().data_ptr() == keys.codes.untyped_storage().data_ptr()
    before = logits_of(model, prompt(9))
    decoder.revert()
    assert queries.codes.untyped_storage().data_ptr() != keys.codes.untyped_storage().data_ptr()
    assert torch.equal(before, logits_of(model, prompt(9)))


def test_what_cannot_be_fused_is_refused_and_nothing_changed() -> None:
    pytest.importorskip("transformers")
    model = build("llama")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match="fused are to be held differently"):
        read_decoder(model, QuantizationSpec(exclude=("k_proj",)))
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj\.weight has infinite or NaN"):
        read_decoder(model, SPECS["int8"])
    assert kinds == [type(module) for module in model.modules()]
    mixed = build("llama")
    quantize_model(mixed, QuantizationSpec(include=(r"q_proj",)))
    with pytest.raises(ModelError, match=r"q_proj, .*v_proj are of several kinds"):
        read_decoder(mixed)
    quantize_model(mixed, QuantizationSpec(WeightFormat(4, 32), include=(r"[kv]_proj",)))
    with pytest.raises(ModelError, match=r"q_proj, .*v_proj are quantised in several ways"):
        read_decoder(mixed)
