"""Fine-tune SmolLM2-135M as a pipeline in bf16: two stages, or two stages x replicas, with ZeRO inside.

    deepspeed --num_gpus 2 examples/pipeline_smollm2.py                              # 2 stages
    deepspeed --num_gpus 4 examples/pipeline_smollm2.py --zero-stage 2               # 2 stages x 2 replicas
    deepspeed --num_gpus 2 examples/pipeline_smollm2.py --schedule zb_v              # no bubble: two chunks per stage

Every rank reads only its own layers from disk; where to cut is found by measuring them. Without GPUs the launcher
starts CPU ranks that communicate through shared memory. `nox -s demo` installs what this needs and runs it too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from finetune import data
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import deepspeed
from ds_pipe import PipelineModule, causal_lm_loss, parameters_on_meta, split_causal_lm

STAGES = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model as a pipeline.")
    parser.add_argument("--model", type=Path, help="transformers folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="text file to train on (default: the Python manual in pydoc)")
    parser.add_argument("--output", type=Path, default=Path("runs/pipeline_smollm2"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="per step and replica (default: %(default)s)")
    parser.add_argument("--schedule", choices=["1f1b", "gpipe", "zb_h1", "zb_v"], default="1f1b")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=0, help="along the replicas")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per sample (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=8, help="samples kept for evaluation (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    deepspeed.init_distributed()
    first = deepspeed.comm.get_rank() == 0
    folder = args.model or data.smollm2_folder(args.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples, held_out = data.blocks(tokenizer, data.read_text(args.text), args.seq_length, args.held_out)

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    row = samples[0][None]
    module = PipelineModule(
        split_causal_lm(model, folder),
        num_stages=STAGES,
        loss_fn=causal_lm_loss,
        partition_method="profile",
        profile_sample=(row, row),
        **({"num_chunks": 2, "placement": "v"} if args.schedule == "zb_v" else {}),
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.micro_batches,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": args.zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.01}},
        "pipeline": {"schedule": args.schedule},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module, config=config, training_data=[(tokens, tokens) for tokens in samples]
    )

    def evaluate() -> float:
        batches: list[tuple[Tensor, Tensor]] = [(tokens[None], tokens[None]) for tokens in held_out]
        return float(engine.eval_batch(iter(batches), num_micro_batches=len(batches)))

    before = evaluate()
    for step in range(args.steps):
        loss = float(engine.train_batch())
        if first:
            print(f"step {step + 1}: loss {loss:.3f}", flush=True)
    after = evaluate()
    engine.save_checkpoint(args.output / "checkpoints")
    if first:
        print(f"layers of the stages: {module.parts}\nheld-out loss {before:.3f} -> {after:.3f}")
    assert after < before
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
