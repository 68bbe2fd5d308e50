"""Compiled and recomputed blocks of transformers' models, and accelerate's way of asking for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from client_scripts import require
from torch._dynamo.backends.registry import lookup_backend

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import same, weights

import deepspeed
import ds_comm
from deepspeed.runtime.activation_checkpointing.policy import KeptBytes
from ds_comm.testing import run_ranks

require("accelerate")


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def engine_of(model: Any, stage: int, **changes: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **changes,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(10 * step + ds_comm.get_rank()))


def train(engine: Any, steps: int = 2) -> tuple[list[float], Any]:
    losses = []
    torch.manual_seed(1)
    for step in range(steps):
        ids = tokens(step)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, weights(engine)


def compiled_llama(stage: int) -> list[bool]:
    """Against an uncompiled run: equal results, one graph, names; then with transformers' own checkpoints, generate."""
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    expected = train(engine_of(llama(), stage))
    model = llama()
    engine = engine_of(model, stage)
    names = list(model.state_dict())
    engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    found = train(engine)
    facts = [found[0] == expected[0], same(found[1], expected[1]), graphs == 1, list(model.state_dict()) == names]
    model.eval()
    with torch.no_grad():
        out = model.generate(tokens(5)[:, :4], max_new_tokens=3, do_sample=False, use_cache=True)
    facts.append(out.shape == (2, 7) and graphs == 1)
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = engine_of(model, stage)
    engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    again = train(engine)
    torch._dynamo.reset()
    return [*facts, again[0] == expected[0], same(again[1], expected[1])]


def test_llama_compiles_to_one_graph_without_breaks() -> None:
    for facts in run_ranks(compiled_llama, 2, 3, timeout=300):
        assert facts == [True] * 7


def recomputed_llama(stage: int) -> list[bool]:
    expected = train(engine_of(llama(), stage))
    kept, facts = {}, []
    for policy in ("none", "full", "selective"):
        engine = engine_of(llama(), stage, activation_checkpointing={"policy": policy})
        found = train(engine)
        facts += [found[0] == expected[0], same(found[1], expected[1])]
        with KeptBytes() as counter:
            loss = engine(input_ids=tokens(3), labels=tokens(3)).loss
        kept[policy] = counter.nbytes
        engine.backward(loss)
    budget = (kept["none"] + kept["full"]) // 2
    engine = engine_of(llama(), stage, activation_checkpointing={"policy_budget": budget})
    found = train(engine)
    with KeptBytes() as counter:
        loss = engine(input_ids=tokens(3), labels=tokens(3)).loss
    facts += [found[0] == expected[0], same(found[1], expected[1])]
    facts += [kept["full"] < kept["selective"] < kept["none"], kept["full"] <= counter.nbytes < kept["none"]]
    for policy in ("full", "selective"):  # a cache would be given keys and values twice, so the block is given none
        found = train(engine_of(llama(use_cache=True), stage, activation_checkpointing={"policy": policy}))
        facts += [found[0] == expected[0], same(found[1], expected[1])]
    return facts


def test_llama_under_every_policy() -> None:
    for facts in run_ranks(recomputed_llama, 2, 3, timeout=300):
        assert facts == [True] * 14


def accelerated(backend: str | None, regional: bool) -> tuple[list[float], bool]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch._dynamo.reset()
    plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=1, zero3_save_16bit_model=True)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    dynamo = TorchDynamoPlugin(backend=backend or "no", use_regional_compilation=regional)
    accelerator = Accelerator(
        deepspeed_plugin=plugin, dynamo_plugin=dynamo, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    model = llama(attention_dropout=0.0)
    engine, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(2):
        loss = engine(input_ids=tokens(step), labels=tokens(step)).loss
        accelerator.backward(loss)
        losses.append(loss.item())
    torch._dynamo.reset()
    return losses, engine.is_compiled


def test_accelerate_asks_for_compilation() -> None:
    environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
    plain = run_ranks(accelerated, 2, None, False, env=environment)
    for regional in (False, True):
        found = run_ranks(accelerated, 2, "aot_eager", regional, env=environment, timeout=300)
        for (losses, compiled), (expected, _) in zip(found, plain, strict=True):
            assert compiled is not regional  # then accelerate compiles the blocks by itself
            assert losses == expected
