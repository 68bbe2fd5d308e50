"""Fine-tune a causal language model with ZeRO-3 in bf16: the main example.

    nox -s demo                                                       # all of it, installed and explained (minutes)
    deepspeed --num_gpus 2 examples/finetune_smollm2.py               # SmolLM2-135M on the Python manual
    deepspeed examples/finetune_smollm2.py --resume                   # continue from the last checkpoint
    deepspeed examples/finetune_smollm2.py --model DIR --text FILE --deepspeed_config FILE --steps 1000 --output DIR

Without GPUs the launcher starts CPU ranks that communicate through shared memory; with GPUs the same script runs on
them, through NCCL. It leaves in `--output`:

    checkpoints/   the state of training, loadable at any number of ranks; a killed run continues from the last one
    model/         the trained model as a folder for AutoModelForCausalLM.from_pretrained
    report.html    loss curve, memory, bytes per step;  steps.jsonl holds the numbers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from finetune import data
from finetune.progress import Progress
from finetune.report import write_report
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
import ds_kernels

HERE = Path(__file__).parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with ZeRO-3.")
    parser.add_argument("--model", type=Path, help="transformers folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="text file to train on (default: the Python manual in pydoc)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_smollm2"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=12, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per sample (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=16, help="samples kept for evaluation (default: %(default)s)")
    parser.add_argument("--prompt", default='The "with" statement is used to', help="what to complete before and after")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument("--kernels", action="store_true", help="put ds-kernels into the model: faster, smaller steps")
    parser.add_argument("--demo", action="store_true", help="launch this script, kill a rank, resume, check everything")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(HERE / "finetune_smollm2.json"))
    return parser.parse_args()


@torch.no_grad()
def evaluate(engine: Any, samples: list[torch.Tensor]) -> float:
    """Mean loss over the samples, the same number on every rank."""
    engine.eval()
    losses = [forward(engine, batch) for batch in engine.deepspeed_io(samples, route="eval")]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean())


def forward(engine: Any, batch: torch.Tensor) -> torch.Tensor:
    tokens = batch.to(engine.device)
    return engine(input_ids=tokens, labels=tokens, use_cache=False).loss


def mean_over_ranks(loss: torch.Tensor) -> float:
    total = loss.detach().float().clone()
    deepspeed.comm.all_reduce(total, log_name="loss")
    return total.item() / deepspeed.comm.get_world_size()


@torch.no_grad()
def complete(engine: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation; the sharded model generates on all ranks together."""
    engine.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(engine.device)
    tokens = engine.module.generate(**inputs, max_new_tokens=data.NEW_TOKENS, do_sample=False)
    engine.train()
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def train(args: argparse.Namespace) -> None:
    deepspeed.init_distributed()
    first = deepspeed.comm.get_rank() == 0
    torch.manual_seed(0)
    model_folder = args.model or data.smollm2_folder(args.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    samples, held_out = data.blocks(tokenizer, data.read_text(args.text), args.seq_length, args.held_out)

    # While this object lives, from_pretrained builds the model under deepspeed.zero.Init: no rank ever holds all of it.
    sharded_loading = HfDeepSpeedConfig(json.loads(Path(args.deepspeed_config).read_text()))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    if args.kernels:
        applied = ds_kernels.apply_kernels(model)
        if first:
            print(f"kernels: {applied}")
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=samples
    )
    del sharded_loading

    state: dict[str, Any] = {}
    if args.resume:
        path, state = engine.load_checkpoint(args.output / "checkpoints")
        if path is None:
            raise SystemExit(f"--resume: no checkpoint in {args.output / 'checkpoints'}")
        if first:
            print(f"resumed after step {engine.global_steps} from {path}")
    else:
        state["loss_before"] = evaluate(engine, held_out)
        state["text_before"] = complete(engine, tokenizer, args.prompt)

    batches = deepspeed.utils.RepeatingLoader(loader)  # after loading: it continues where the checkpoint was saved
    with Progress(engine, args) as progress:
        while engine.global_steps < args.steps:
            progress.begin_step()
            loss = torch.zeros((), device=engine.device)
            for _ in range(engine.gradient_accumulation_steps()):
                micro_loss = forward(engine, next(batches))
                engine.backward(micro_loss)
                engine.step()  # acts once per gradient_accumulation_steps calls
                loss += micro_loss.detach() / engine.gradient_accumulation_steps()
            progress.end_step(mean_over_ranks(loss))
            if engine.global_steps % args.save_every == 0 or engine.global_steps == args.steps:
                engine.save_checkpoint(args.output / "checkpoints", client_state=state)

    state["loss_after"] = evaluate(engine, held_out)
    state["text_after"] = complete(engine, tokenizer, args.prompt)
    engine.save_16bit_model(args.output / "model", "model.safetensors")
    if first:
        engine.module.config.save_pretrained(args.output / "model")
        engine.module.generation_config.save_pretrained(args.output / "model")
        tokenizer.save_pretrained(args.output / "model")
        progress.finish(state, engine.config)
        print(f"\nheld-out loss {state['loss_before']:.3f} -> {state['loss_after']:.3f}")
        print(f"before: {state['text_before']}\n\nafter:  {state['text_after']}\n")
        print(f"model: {args.output / 'model'}   report: {write_report(args.output)}")
    engine.destroy()
    deepspeed.comm.destroy_process_group()


def main() -> None:
    args = parse_args()
    if args.demo:
        from finetune.demo import run_demo

        run_demo(Path(__file__), args)
    else:
        train(args)


if __name__ == "__main__":
    main()
