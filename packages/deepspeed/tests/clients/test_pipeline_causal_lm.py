"""Models of transformers split into a pipeline, over ZeRO: the bits of the engine that trains the model itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines import Trained, check_equal, finish_unsplit, make_config, weights_of

import deepspeed
import ds_comm
from deepspeed.pipe import PipelineModule
from ds_comm.testing import run_ranks
from ds_pipe import causal_lm_loss, huggingface_name, split_causal_lm

NUM, STEPS, VOCABULARY = 2, 2, 61


def make_model(name: str) -> Any:
    import transformers

    torch.manual_seed(4)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    if name == "gpt2":
        config = transformers.GPT2Config(
            **sizes, n_embd=24, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        **sizes,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=name == "llama-tied",
    )
    return transformers.LlamaForCausalLM(config)


def batch(replica: int, step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * replica + 100 * step + index)
    return torch.randint(VOCABULARY, (2, 9), generator=generator)


def pipelined(name: str, config: dict[str, Any], options: dict[str, Any]) -> Trained:
    layers = split_causal_lm(make_model(name))
    module = PipelineModule(layers, num_stages=2, loss_fn=causal_lm_loss, partition_method="uniform", **options)
    engine = deepspeed.initialize(model=module, config=config)[0]
    losses, norms = [], []
    for step in range(STEPS):
        tokens = [batch(engine.get_data_parallel_rank(), step, i) for i in range(NUM)]
        losses.append(engine.train_batch((t, t) for t in tokens).item())
        norms.append(engine.get_global_grad_norm())
    found = losses, norms, {huggingface_name(key): value for key, value in weights_of(engine).items()}
    engine.destroy()
    return found


def whole(name: str, config: dict[str, Any]) -> Trained:
    model = make_model(name)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def loss_of(step: int, index: int) -> torch.Tensor:
        tokens = batch(ds_comm.get_rank(), step, index)
        return causal_lm_loss(engine(tokens, use_cache=False).logits, tokens)

    return finish_unsplit(engine, range(STEPS), loss_of)


@pytest.mark.parametrize(("stage", "schedule"), [(0, "1f1b"), (3, "1f1b"), (3, "zb_h1"), (2, "zb_v")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_stages_times_replicas_equal_the_model(name: str, stage: int, schedule: str) -> None:
    config = make_config(stage, "bf16", NUM, pipeline={"schedule": schedule})
    options = {"num_chunks": 2, "placement": "v"} if schedule == "zb_v" else {}
    check_equal(run_ranks(pipelined, 4, name, config, options), run_ranks(whole, 2, name, config)[0])
