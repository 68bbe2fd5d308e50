"""DeepSpeedTransformerLayer against plain torch in fp64 and a BertLayer of the same weights; its memory options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_kernels import KernelArgumentError
from ds_kernels.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

pytestmark = pytest.mark.cpu_extra


def layer_of(hidden: int = 32, heads: int = 4, **options: Any) -> DeepSpeedTransformerLayer:
    torch.manual_seed(0)
    config = DeepSpeedTransformerConfig(
        hidden_size=hidden, heads=heads, intermediate_size=2 * hidden, initializer_range=0.3, **options
    )
    layer = DeepSpeedTransformerLayer(config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("nw") or name == "norm_w" else 0.0, 0.3)
    return layer


def plain(layer: DeepSpeedTransformerLayer, x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor]) -> Tensor:
    """The layer's two forms as its docstring states them."""
    p, config = parameters, layer.config

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}w"], p[f"{name}b"], config.layer_norm_eps)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for t in F.linear(x, p["attn_qkvw"], p["attn_qkvb"]).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), p["attn_ow"], p["attn_ob"])

    def mlp(x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, p["inter_w"], p["inter_b"])), p["output_w"], p["output_b"])

    if config.pre_layer_norm:
        a = x + attention(norm(x, "norm_"))
        return a + mlp(norm(a, "attn_n"))
    a = norm(x + attention(x), "attn_n")
    return norm(a + mlp(a), "norm_")


def run(layer: DeepSpeedTransformerLayer, x: Tensor, mask: Tensor | None, pull: Tensor) -> list[Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, mask)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], pull.to(y.dtype))]


@pytest.mark.parametrize("mask_kind", [None, "float", "bool"])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"gelu_checkpoint": True, "normalize_invertible": True}], ids=["keep", "recompute"]
)
def test_forward_and_gradients(options: dict[str, bool], pre_layer_norm: bool, mask_kind: str | None) -> None:
    layer = layer_of(pre_layer_norm=pre_layer_norm, **options)
    x, pull = torch.randn(3, 11, 32), torch.randn(3, 11, 32)
    seen = torch.rand(3, 1, 1, 11) < 0.7
    seen[..., 0] = True
    mask = {None: None, "bool": seen, "float": torch.where(seen, 0.0, -1e4)}[mask_kind]
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    leaf = x.double().requires_grad_()
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    y = plain(layer, leaf, wide_mask, parameters)
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, *parameters.values()], pull.double())]
    for mine, theirs in zip(run(layer, x, mask, pull), expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    layer = layer_of(pre_layer_norm=False, layer_norm_eps=1e-5)
    x = torch.randn(2, 9, 32)
    low = layer_of(pre_layer_norm=False, layer_norm_eps=1e-5).to(dtype)
    assert (low(x.to(dtype)).float() - layer(x)).abs().max() <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("option", ["gelu_checkpoint", "attn_dropout_checkpoint", "normalize_invertible"])
def test_recomputing_changes_nothing_with_dropout(option: str) -> None:
    dropout = {"attn_dropout_ratio": 0.2, "hidden_dropout_ratio": 0.1, "pre_layer_norm": False}
    x, pull = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    found = []
    for value in (False, True):
        layer = layer_of(**dropout, **{option: value})
        torch.manual_seed(5)
        found.append(run(layer, x, None, pull))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["gelu_checkpoint", "attn_dropout_checkpoint", "normalize_invertible"])
def test_recomputing_keeps_less(option: str) -> None:
    """Bytes of the distinct storages that autograd keeps."""
    x = torch.randn(2, 24, 32, requires_grad=True)
    kept = []
    for value in (False, True):
        layer = layer_of(attn_dropout_ratio=0.1, pre_layer_norm=False, **{option: value})
        storages: dict[int, Any] = {}

        def pack(tensor: Tensor, storages: dict[int, Any] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        y.sum().backward()
    assert kept[1] < kept[0]


def test_dropout_is_seeded_and_switched_off() -> None:
    layer = layer_of(attn_dropout_ratio=0.3, hidden_dropout_ratio=0.3)
    x = torch.randn(2, 6, 32)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    quiet = layer.eval()(x)
    layer.train()
    layer.config.training = False
    assert torch.equal(layer(x), quiet)


class Bert(nn.Module):
    """The names and sizes of a Hugging Face BertLayer, without its computation."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        for name in ("query", "key", "value"):
            self.attention.self.register_module(name, nn.Linear(hidden, hidden))
        self.attention.self.dropout = nn.Dropout(0.25)
        self.attention.self.num_attention_heads = heads
        self.attention.output, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.output.dense = nn.Linear(hidden, hidden)
        self.attention.output.LayerNorm = nn.LayerNorm(hidden)
        self.intermediate.dense = nn.Linear(hidden, inner)
        self.output.dense, self.output.LayerNorm = nn.Linear(inner, hidden), nn.LayerNorm(hidden, eps=1e-6)
        self.output.dropout = nn.Dropout(0.5)


def test_bert_weights_in_and_out() -> None:
    bert, other = Bert(16, 40, 2).bfloat16().eval(), Bert(16, 40, 2).bfloat16()
    layer = DeepSpeedTransformerLayer.from_bert(bert, return_tuple=True)
    config = layer.config
    assert (config.hidden_size, config.intermediate_size, config.heads, config.layer_norm_eps) == (16, 40, 2, 1e-6)
    assert (config.attn_dropout_ratio, config.hidden_dropout_ratio) == (0.25, 0.5)
    assert layer.inter_w.dtype == torch.bfloat16 and not layer.training and not config.pre_layer_norm
    other.load_state_dict(layer.bert_state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), bert.parameters(), strict=True))
    assert isinstance(layer(torch.randn(1, 3, 16).bfloat16()), tuple)


def test_same_results_as_hugging_faces_layer() -> None:
    modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, intermediate_size=96, attn_implementation="eager"
    )
    bert = modeling.BertLayer(config).eval()
    layer = DeepSpeedTransformerLayer.from_bert(bert)
    x, mask = torch.randn(2, 10, 48), torch.where(torch.rand(2, 1, 1, 10) < 0.8, 0.0, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    for given in (None, mask):
        expected = bert(x, given)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(layer(x, given), expected, rtol=1e-5, atol=1e-5)


def test_initialisation() -> None:
    config = DeepSpeedTransformerConfig(hidden_size=128, heads=2, num_hidden_layers=8, initializer_range=0.1)
    first, second = DeepSpeedTransformerLayer(config), DeepSpeedTransformerLayer(config)
    assert first.inter_w.shape == (512, 128) and config.intermediate_size == -1
    assert second.config.layer_id == first.config.layer_id + 1
    assert first.attn_qkvw.std().item() == pytest.approx(0.1, rel=0.05)
    assert first.output_w.std().item() == pytest.approx(0.025, rel=0.05)
    assert not first.attn_nb.any() and bool((first.norm_w == 1).all())


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "heads": 8, "gelu_checkpoint": True}), encoding="utf-8")
    config = DeepSpeedTransformerConfig.from_json_file(path)
    assert (config.hidden_size, config.heads, config.gelu_checkpoint, config.layer_norm_eps) == (64, 8, True, 1e-12)
    with pytest.raises(KernelArgumentError, match="unknown keys hiden_size; known are"):
        DeepSpeedTransformerConfig.from_dict({"hiden_size": 64})


def test_compiles_without_graph_break() -> None:
    layer, x = layer_of(), torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pull = torch.randn(2, 5, 32)
    for mine, theirs in zip(run(compiled, x, None, pull), run(layer, x, None, pull), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_input() -> None:
    with pytest.raises(KernelArgumentError, match=r"hidden_size is 30 and heads 4; expected a multiple"):
        DeepSpeedTransformerLayer(DeepSpeedTransformerConfig(hidden_size=30, heads=4))
    with pytest.raises(KernelArgumentError, match="1 initial_weights and 0 initial_biases; expected 8 of each"):
        DeepSpeedTransformerLayer(DeepSpeedTransformerConfig(hidden_size=32, heads=4), [torch.ones(1)])
    layer = layer_of()
    with pytest.raises(KernelArgumentError, match=r"shape \(4, 32\); expected \[batch, tokens, 32\]"):
        layer(torch.randn(4, 32))
    with pytest.raises(KernelArgumentError, match="output_attentions are given; only None and False"):
        layer(torch.randn(1, 4, 32), head_mask=None, output_attentions=True)
