"""Split causal language models against the models themselves, to the bit.

Those of transformers are skipped where it is missing (`nox -s clients` has it).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lms import OWN, TRANSFORMERS, Config, Model, make, tokens
from safetensors.torch import save_file
from torch import nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import (
    PartitionError,
    PipelineError,
    PipelineModule,
    causal_lm_loss,
    huggingface_name,
    parameters_on_meta,
    pipeline,
    split_causal_lm,
)

missing = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
MODELS = [*OWN, *(pytest.param(name, marks=missing) for name in TRANSFORMERS)]
SPLIT = ["own", "own tied", "llama", "llama tied", "gpt2"]

Gradients = dict[str, torch.Tensor]


def padded(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(inputs)
    mask[0, :3] = 0
    return {"input_ids": inputs, "attention_mask": mask}


def unsplit(name: str) -> tuple[list[float], Gradients]:
    model = make(name)
    losses = []
    for inputs in tokens(2):
        loss = causal_lm_loss(model(**padded(inputs), use_cache=False).logits, inputs)
        (loss / 2).backward()
        losses.append(loss)
    mean = torch.stack(losses).sum() / 2
    return mean.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def split(name: str, schedule: str = "1f1b") -> tuple[float, Gradients]:
    layers = split_causal_lm(make(name))
    chunks: dict[str, Any] = {"num_chunks": 2, "placement": "v"} if schedule == "zb_v" else {}
    module = PipelineModule(layers, loss_fn=causal_lm_loss, partition_method="uniform", **chunks)
    pipe = pipeline(module, num_micro_batches=2, schedule=schedule)
    data = iter([(padded(inputs), inputs) for inputs in tokens(2)])
    loss = pipe.train_batch(data).item()
    return loss, {huggingface_name(n): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_loss_and_gradients(name: str, num_stages: int) -> None:
    check(name, run_ranks(split, num_stages, name, timeout=120))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in OWN else missing) for name in SPLIT])
@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v"])
def test_split_backward(name: str, schedule: str) -> None:
    check(name, run_ranks(split, 2, name, schedule, timeout=120))


def check(name: str, stages: list[tuple[float, Gradients]]) -> None:
    loss, gradients = unsplit(name)
    found: Gradients = {}
    for stage_loss, stage in stages:
        assert stage_loss == loss
        for key, gradient in stage.items():
            assert torch.equal(gradient, gradients[key]), key
        found |= stage
    assert found.keys() == gradients.keys()


@pytest.fixture
def world() -> Any:
    ds_comm.init_distributed()
    yield
    ds_comm.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("world")
def test_logits_and_names(name: str) -> None:
    model = make(name)
    module = PipelineModule(split_causal_lm(model))
    inputs = tokens(1)[0]
    assert torch.equal(module(inputs), model(input_ids=inputs, use_cache=False).logits)
    assert torch.equal(module(padded(inputs)), model(**padded(inputs), use_cache=False).logits)
    names = {huggingface_name(name): p for name, p in module.named_parameters()}
    assert names.keys() == dict(model.named_parameters()).keys()
    assert all(parameter is model.get_parameter(key) for key, parameter in names.items())


@missing
def test_the_loss_is_transformers_own() -> None:
    model = make("llama")
    inputs = tokens(1)[0]
    labels = inputs.clone()
    labels[:, :2] = -100
    outputs = model(input_ids=inputs, labels=labels)
    assert torch.equal(causal_lm_loss(outputs.logits, labels), outputs.loss)


def from_files(name: str, folder: str) -> tuple[list[str], bool, float]:
    """What a stage holds, whether what it read is the model's, and the loss."""
    with parameters_on_meta():
        empty = make(name)
    assert all(p.device.type == "meta" for p in empty.parameters())
    module = PipelineModule(split_causal_lm(empty, folder), loss_fn=causal_lm_loss, partition_method="parameters")
    whole = make(name)
    equal = all(torch.equal(p, whole.get_parameter(huggingface_name(n))) for n, p in module.named_parameters())
    loss = pipeline(module, num_micro_batches=1).train_batch(iter([(tokens(1)[0], tokens(1)[0])])).item()
    return [huggingface_name(n) for n, _ in module.named_parameters()], equal, loss


@pytest.mark.parametrize("name", [name for name in MODELS if "gpt_neox" not in str(name)])  # see split_causal_lm
def test_each_stage_reads_its_own_weights(name: str, tmp_path: Path) -> None:
    model = make(name)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
    else:
        save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    expected = causal_lm_loss(model(input_ids=tokens(1)[0], use_cache=False).logits, tokens(1)[0]).item()
    (first, *right), (second, *also) = run_ranks(from_files, 2, name, str(tmp_path), timeout=120)
    assert right == also == [True, expected]
    assert set(first) | set(second) == dict(model.named_parameters()).keys()
    assert set(first) & set(second) <= {"model.embed.weight", "model.embed_tokens.weight", "transformer.wte.weight"}


def test_several_files(tmp_path: Path) -> None:
    model = make("own")
    names = [n for n, _ in model.named_parameters()]
    for at, part in enumerate((names[::2], names[1::2])):
        save_file({n: model.get_parameter(n).detach() for n in part}, tmp_path / f"{at}.safetensors")
    listed = ", ".join(f'"{n}": "{at % 2}.safetensors"' for at, n in enumerate(names))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{listed}}}}}')
    with parameters_on_meta():
        layers = split_causal_lm(make("own"), tmp_path)
    built = layers[3].build()
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in built.named_parameters())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        split_causal_lm(make("own"), tmp_path)
    weights = {n: p.detach() for n, p in make("own").named_parameters()}
    del weights["lm_head.weight"]
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    layers = split_causal_lm(make("own"), tmp_path)
    with pytest.raises(PartitionError, match=r"lm_head.weight is not in"):
        layers[-1].build()
    with pytest.raises(PartitionError, match=r"model.norm.weight in .* is \(3,\); expected \(16,\)"):
        layers[-2].build()
    with torch.device("meta"):
        empty = make("own")
    with pytest.raises(PartitionError, match=r"buffer model.scales has no memory"):
        split_causal_lm(empty, tmp_path)[1].build()


class Rewrites(Model):
    """Does something between its blocks, or after them, that layers cannot see."""

    def __init__(self, how: str) -> None:
        super().__init__(Config())
        self.model.__class__ = type("Rewriting", (type(self.model),), {"forward": getattr(self, how)})

    @staticmethod
    def between(decoder: Any, inputs_embeds: Any, use_cache: bool) -> Any:
        hidden = inputs_embeds
        for layer in decoder.layers:
            hidden = layer(hidden * 1.0, None)
        return (decoder.norm(hidden),)

    @staticmethod
    def after(decoder: Any, inputs_embeds: Any, use_cache: bool) -> Any:
        hidden = inputs_embeds
        for layer in decoder.layers:
            hidden = layer(hidden, None)
        return (decoder.norm(hidden) * 2,)


@pytest.mark.parametrize(("how", "text"), [("between", "between its blocks"), ("after", "more after its blocks")])
def test_models_that_layers_would_change_are_refused(how: str, text: str) -> None:
    first, second, *_ = split_causal_lm(Rewrites(how))
    with pytest.raises(PipelineError, match=text):
        second.build()(first.build()(tokens(1)[0]))


def test_refusals() -> None:
    with pytest.raises(PartitionError, match="Linear is no causal language model"):
        split_causal_lm(nn.Linear(2, 2))
    with pytest.raises(PartitionError, match="Decoder is no causal language model"):
        split_causal_lm(make("own").model)  # type: ignore[arg-type]
    model: Any = make("own")
    model.model.also_norm = nn.LayerNorm(2)
    with pytest.raises(PartitionError, match=r"2 norms follow model\.layers"):
        split_causal_lm(model)
    biased: Any = make("own tied")
    biased.lm_head.bias = nn.Parameter(torch.zeros(50))
    with pytest.raises(PartitionError, match="tied output embedding has weights of its own"):
        split_causal_lm(biased)
    with pytest.raises(PipelineError, match="given str; expected a tensor of token numbers"):
        split_causal_lm(make("own"))[0].build()("hello")
