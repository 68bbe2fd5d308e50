"""Reinforcement learning in small: a model writes, a reward judges, REINFORCE trains, and the model writes again.

Quick run: deepspeed --num_gpus 2 examples/hybrid_rlhf.py --steps 25

The reward is the share of even tokens in an answer, so it can be watched rising from one half. One model trains with
ZeRO-3 and generates with ds-inference's decoder between steps: `hybrid_engine` in the config is all it takes. Ranks
generate answers of different lengths without waiting for each other.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed
import ds_comm

VOCABULARY = 64
PROMPT = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="REINFORCE between ZeRO-3 and a fused decoder.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="answers per rank and step (default: %(default)s)")
    return parser.parse_known_args()[0]


def make_engine(args: argparse.Namespace) -> deepspeed.DeepSpeedHybridEngine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": args.rows,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "hybrid_engine": {"enabled": True, "max_out_tokens": 64},
            "steps_per_print": None,
        },
    )[0]


def reward_of(answers: torch.Tensor) -> torch.Tensor:
    """[rows]: the share of even tokens."""
    return (answers % 2 == 0).float().mean(1)


def policy_loss(engine: deepspeed.DeepSpeedHybridEngine, tokens: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """- advantage * log likelihood of the answers, the mean reward of all ranks being the baseline."""
    logits = engine(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 : -1]
    chosen = logits.log_softmax(-1).gather(2, tokens[:, PROMPT:, None]).squeeze(2)
    baseline = reward.mean()
    ds_comm.all_reduce(baseline)
    advantage = reward - baseline / ds_comm.get_world_size()
    return -(advantage[:, None] * chosen).mean()


def main() -> None:
    args = parse_args()
    engine = make_engine(args)
    rank, mean = ds_comm.get_rank(), torch.zeros(())
    torch.manual_seed(1 + rank)
    for step in range(args.steps):
        engine.eval()
        prompts = torch.randint(2, VOCABULARY, (args.rows, PROMPT))
        tokens = engine.generate(prompts, max_new_tokens=12 + 4 * rank, do_sample=True, top_k=0)
        engine.train()
        reward = reward_of(tokens[:, PROMPT:])
        engine.backward(policy_loss(engine, tokens, reward))
        engine.step()
        mean = reward.mean()
        ds_comm.all_reduce(mean)
        mean /= ds_comm.get_world_size()
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1:3}: reward {mean:.3f}", flush=True)
    assert args.steps < 25 or mean > 0.6, f"the reward did not rise: {mean:.3f}"


if __name__ == "__main__":
    main()
