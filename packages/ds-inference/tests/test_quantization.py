"""Weight-only quantisation: which layers, in which format, and that the layer computes with its codes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_inference import ConfigError, ModelError, QuantizationSpec, QuantizedLinear, WeightFormat, quantize_model
from ds_inference.config import resolve_config
from ds_inference.quantization import spec_of_config, spec_of_patterns
from ds_kernels import QuantizedWeight


def model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"q_proj": nn.Linear(64, 48), "up": nn.Linear(64, 96, bias=False), "gate": nn.Linear(64, 4, bias=False)}
    )
    return nn.ModuleDict({"layers": nn.ModuleList([block]), "lm_head": nn.Linear(64, 80, bias=False)})


def spec(source: Any) -> QuantizationSpec:
    found = QuantizationSpec.parse(source)
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_quantised_layer_computes_with_its_codes(bits: int, activation_bits: int | None) -> None:
    layer = nn.Linear(64, 48)
    weight = WeightFormat(bits, 32).apply(layer.weight.detach())
    quantised = QuantizedLinear(weight, layer.bias, activation_bits)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = quantised(x)
    expected = nn.functional.linear(x, weight.dequantize(), layer.bias)
    limit = 0.02 if activation_bits else 1e-5
    torch.testing.assert_close(y, expected, rtol=limit, atol=limit)
    y.sum().backward()
    assert x.grad is not None and layer.bias.grad is not None
    assert torch.equal(quantised.weight, weight.dequantize())


def test_dtype_moves_and_copies_leave_the_codes_alone() -> None:
    layer = nn.Linear(64, 48)
    quantised = QuantizedLinear(WeightFormat(4, 32, symmetric=False).apply(layer.weight.detach()), layer.bias)
    before = quantised.quantized
    x = torch.randn(2, 64)
    expected = quantised(x)
    for other in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised)), quantised.bfloat16().float()):
        assert torch.equal(other.quantized.scale, before.scale) and other.quantized.scale.dtype == torch.bfloat16
        torch.testing.assert_close(other(x), expected, rtol=1e-2, atol=1e-2)
    loaded = QuantizedLinear(
        WeightFormat(4, 32, symmetric=False).apply(torch.randn(48, 64)), nn.Parameter(torch.ones(48))
    )
    loaded.load_state_dict(quantised.state_dict())
    assert torch.equal(loaded(x), quantised(x))


def test_which_layers() -> None:
    whole = model()
    assert quantize_model(whole, spec("int4")) == ["layers.0.q_proj", "layers.0.up", "lm_head"]
    head, up = whole.get_submodule("lm_head"), whole.get_submodule("layers.0.up")
    assert isinstance(head, QuantizedLinear) and isinstance(up, QuantizedLinear)
    assert (head.bits, up.bits, up.group_size) == (8, 4, 32)
    assert type(whole.get_submodule("layers.0.gate")) is nn.Linear
    other = model()
    assert quantize_model(other, spec({"bits": 8, "exclude": "lm_head", "activation_bits": 8})) == [
        "layers.0.q_proj",
        "layers.0.up",
    ]
    assert other.get_submodule("layers.0.up").activation_bits == 8
    assert quantize_model(model(), spec({"include": [r"q_proj$"]})) == ["layers.0.q_proj"]


def test_a_shared_layer_is_quantised_once() -> None:
    layer = nn.Linear(64, 64)
    whole = nn.ModuleDict({"a": layer, "b": layer})
    assert quantize_model(whole, spec("int8")) == ["a", "b"]
    assert whole["a"] is whole["b"]


def test_outputs_stay_near() -> None:
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 32))
    x = torch.randn(16, 128)
    expected = whole(x)
    for source, limit in (("int8", 0.02), ("int4", 0.2)):
        quantised = copy.deepcopy(whole)
        quantize_model(quantised, spec(source))
        error = ((quantised(x) - expected).norm() / expected.norm()).detach()
        assert 0 < float(error) < limit


def test_fused_parts_have_one_format() -> None:
    rules = spec({"bits": 8, "exclude": "k_proj"})
    weight = torch.randn(32, 64)
    assert isinstance(rules.quantize("a.q_proj", weight), QuantizedWeight)
    assert isinstance(rules.quantize(["a.q_proj", "a.v_proj"], weight), QuantizedWeight)
    assert rules.quantize("a.k_proj", weight) is weight
    with pytest.raises(ModelError, match=r"a\.k_proj: as it is.*one format"):
        rules.quantize(["a.q_proj", "a.k_proj"], weight)


def test_the_configurations_section() -> None:
    def of(**keys: Any) -> QuantizationSpec | None:
        return spec_of_config(resolve_config(keys))

    assert of() is None and of(quant={"enabled": False}) is None
    assert of(dtype="int8") == spec("int8")
    four = of(quant={"weight": {"num_bits": 4, "q_type": "asymmetric"}})
    assert four is not None and four.default == WeightFormat(4, 32, symmetric=False, search=True)
    assert four.activation_bits is None
    both = of(quant={"activation": {"num_bits": 8}, "qkv": {"enabled": False}})
    assert both is not None and both.activation_bits == 8
    assert both.format("h.0.self_attn.q_proj") is None and both.format("h.0.mlp.up_proj") is not None
    some = of(quant={"weight": {"post_init_quant": {"fc1": {"num_bits": 4, "group_size": 64, "symmetric": True}}}})
    assert some is not None and some.format("x.fc2") is None
    assert some.format("x.fc1") == WeightFormat(4, 64, symmetric=True, search=True)


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ({"weight": {"num_bits": 5}}, "5 bits"),
        ({"weight": {"q_groups": 3}}, "q_groups is 3"),
        ({"activation": {"num_bits": 4}}, "activation_bits is 4"),
        ({"weight": {"post_init_quant": {"fc": {"num_bit": 4}}}}, r"fc\.num_bit: unknown key"),
        ({"weight": {"post_init_quant": {"fc": {"group_dim": 0}}}}, "group_dim is 0"),
        ({"weight": {"quantized_initialization": {"group_size": 33}}}, "multiple of 32"),
    ],
)
def test_bad_values_in_the_section(quant: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec_of_config(resolve_config({"quant": quant}))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int3", "int3"),
        ({"bits": 3}, "bits is 3"),
        ({"bit": 8}, r"quantization\.bit: unknown key"),
        ({"include": "("}, "no regular expression"),
        ({"activation_bits": 16}, "activation_bits is 16"),
    ],
)
def test_bad_specs(source: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantizationSpec.parse(source)


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ModelError, match="nothing of Sequential is quantised"):
        quantize_model(nn.Sequential(nn.ReLU()), spec("int8"))
    broken = nn.ModuleDict({"fc": nn.Linear(64, 64)})
    with torch.no_grad():
        broken["fc"].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"fc: .*infinite or NaN"):
        quantize_model(broken, spec("int8"))


def test_upstreams_patterns() -> None:
    found = spec_of_patterns({"up": {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False}})
    whole = model()
    assert quantize_model(whole, found) == ["layers.0.up"]
    x: Tensor = torch.randn(2, 64)
    assert whole.get_submodule("layers.0.up")(x).shape == (2, 96)
