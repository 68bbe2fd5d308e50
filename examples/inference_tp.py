"""Tensor parallelism: a Llama-like model split over ranks, with the same logits and the same answer as on one.

Quick run: deepspeed --num_gpus 2 examples/inference_tp.py

Each rank holds a part of every layer; heads are dealt whole, and need not divide. The plan is printed before anything
is split. `--model` takes a transformers folder; without it, a small random model stands for one. Without GPUs the
launcher starts CPU ranks that communicate through shared memory.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deepspeed
from ds_inference import plan_model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate with a model that is split over ranks.")
    parser.add_argument("--model", type=Path, help="transformers folder (default: a small random model)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args()


def load(folder: Path | None) -> PreTrainedModel:
    """The same model on every rank, in fp32."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    args = parse_args()
    deepspeed.init_distributed()
    ranks = deepspeed.comm.get_world_size()
    first = deepspeed.comm.get_rank() == 0
    model = load(args.model)
    whole = copy.deepcopy(model)
    if first:
        print(plan_model(model, ranks), flush=True)

    engine = deepspeed.init_inference(
        model, dtype=torch.float32, tensor_parallel={"tp_size": ranks}, replace_with_kernel_inject=True
    )
    prompt = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        distance = (engine(prompt).logits - whole(prompt).logits).abs().max().item()
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": args.tokens, "do_sample": False}
    answer = engine.generate(prompt, **arguments)
    if first:
        own = sum(parameter.numel() for parameter in engine.module.parameters())
        of = sum(parameter.numel() for parameter in whole.parameters())
        print(f"{ranks} ranks, {own:,} of {of:,} parameters here; logits are {distance:.1e} from one rank's at most")
        print("tokens:", answer[0, prompt.shape[1] :].tolist())
    assert distance < 1e-4
    assert torch.equal(answer, whole.generate(prompt, **arguments))
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
