"""Hugging Face's mixtures of experts at ZeRO-3, their sparse blocks leaf modules, against plain one-process training.

Tokens are so few that experts go without any, on one rank and not on the other; each gather is a collective (gloo).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
import ds_comm
from ds_comm.testing import run_ranks

pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}


def make(kind: str) -> tuple[torch.nn.Module, type[torch.nn.Module]]:
    """A tiny model in fp32 and the class of its sparse block."""
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=8)
        return transformers.MixtralForCausalLM(config).float(), MixtralSparseMoeBlock
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=8, moe_intermediate_size=12, shared_expert_intermediate_size=16
    )
    return transformers.Qwen2MoeForCausalLM(config).float(), Qwen2MoeSparseMoeBlock


def batch(step: int, index: int) -> torch.Tensor:
    return torch.randint(0, 32, (1, 3), generator=torch.Generator().manual_seed(10 * step + index))


def train(kind: str) -> tuple[list[float], list[float], int]:
    model, block = make(kind)
    leaves = deepspeed.utils.set_z3_leaf_modules(model, [block])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    losses, norms = [], []
    for step in range(3):
        tokens = batch(step, ds_comm.get_rank())
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, len(leaves)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_sparse_blocks_train_as_in_one_process(kind: str) -> None:
    results = run_ranks(train, 2, kind, transport="gloo", timeout=120)
    model, _ = make(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        losses = [model(input_ids=batch(step, index), labels=batch(step, index)).loss for index in range(2)]
        (sum(losses) / 2).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        for rank in range(2):
            assert results[rank][0][step] == pytest.approx(float(losses[rank].detach()), rel=1e-4)
            assert results[rank][1][step] == pytest.approx(norm, rel=1e-4)
    assert results[0][2] == results[1][2] == 2
